"""What a run is shown: which pictures are mirrored, and which the similarity start looks at, few and one at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import items

from preprocess import build
from trainer import cli
from trainer.dataset import load_pixels, read_manifest
from trainer.material import SIMILAR, flipped, similar


def test_the_similarity_start_looks_at_a_bounded_number_of_pictures_that_the_seed_chooses() -> None:
    many = items([(32, 32)] * 500)
    assert list(similar(many[:SIMILAR], 0).items) == many[:SIMILAR]
    few = [similar(many, seed).items for seed in (0, 0, 1)]
    assert len({item.name for item in few[0]}) == SIMILAR
    assert few[0] == few[1] == sorted(few[0], key=many.index)
    assert few[0] != few[2]


def test_its_pictures_are_those_of_the_dataset_read_when_they_are_asked_for(
    tiny_pictures: Path, tmp_path: Path
) -> None:
    build(str(tiny_pictures), tmp_path, cli.validate({"data": {"source": "x"}}).data, 32, 16)
    own = read_manifest(tmp_path / "dataset.jsonl")
    gone = replace(own[0], file=tmp_path / "gone.png")
    pictures = similar([*own, gone], 0)
    assert len(pictures) == len(own) + 1
    assert all(torch.equal(picture, load_pixels(item)) for picture, item in zip(pictures[: len(own)], own, strict=True))
    with pytest.raises(FileNotFoundError):
        pictures[len(own)]


def test_a_picture_is_never_mirrored_when_any_of_its_captions_has_a_side() -> None:
    plain, sign = items([(32, 32)] * 2)
    sign = replace(sign, captions=("a TOK", "a TOK beside a sign"))
    data = cli.validate({"data": {"source": "x", "flip": True}}).data
    assert flipped(data, [plain, sign]) == {plain.name}
