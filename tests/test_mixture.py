"""Folders count as they were told to: showings, loss weights, and captions whose tags move."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import items, latents

from trainer.args import DataArgs, TrainArgs
from trainer.dataset import Dataset, Item, Tags, read_manifest, varied
from trainer.mixture import MixtureError, repeated, weights
from trainer.run import RunError, opened


def pictures(**counts: int) -> list[Item]:
    folders = [folder for folder, count in counts.items() for _ in range(count)]
    made = items([(32, 32)] * len(folders))
    return [replace(item, folder=folder) for item, folder in zip(made, folders, strict=True)]


def showings(of: list[Item]) -> dict[str, Counter[str]]:
    """Folder -> picture name -> how often it is shown."""
    return {folder: Counter(item.name for item in of if item.folder == folder) for folder in {i.folder for i in of}}


def test_repeats_are_showings_in_an_epoch() -> None:
    shown = repeated(pictures(dog=2, rug=3), {"dog": 3}, balance=False)
    assert showings(shown) == {"dog": {"p0": 3, "p1": 3}, "rug": {"p2": 1, "p3": 1, "p4": 1}}
    data = Dataset(shown, latents(shown), batch_size=3, seed=0)
    seen = Counter(name for i in range(len(data)) for name in data.micro(i).names)  # a round: 3 epochs
    assert seen == {"p0": 9, "p1": 9, "p2": 3, "p3": 3, "p4": 3}


def test_without_options_nothing_is_repeated() -> None:
    given_ = pictures(dog=2, rug=3)
    assert repeated(given_, {}, balance=False) == given_
    assert weights(given_, {}) is None


def test_balanced_folders_are_shown_equally_often() -> None:
    shown = showings(repeated(pictures(dog=2, rug=7), {}, balance=True))
    assert sorted(shown["dog"].values()) == [3, 4]
    assert set(shown["rug"].values()) == {1}


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1), st.integers(1, 4))
def test_balance_keeps_its_promises(counts: dict[str, int], times: int) -> None:
    first = min(counts)
    shown = showings(repeated(pictures(**counts), {first: times}, balance=True))
    largest = max(count * (times if folder == first else 1) for folder, count in counts.items())
    for folder, names in shown.items():
        assert names.total() == largest
        assert len(names) == counts[folder]
        assert max(names.values()) - min(names.values()) <= 1


def test_weights_go_with_the_pictures() -> None:
    of = pictures(dog=1, rug=2)
    by_name = weights(of, {"rug": 0.25})
    assert by_name == {"p0": 1.0, "p1": 0.25, "p2": 0.25}
    data = Dataset(of, latents(of), batch_size=2, seed=0, weights=by_name)
    for i in range(3):
        samples = data.micro(i)
        assert samples.weight is not None
        assert samples.weight.tolist() == [by_name[name] for name in samples.names]


@pytest.mark.parametrize(
    "ask", [lambda of: repeated(of, {"dogs": 2}, balance=False), lambda of: weights(of, {"dogs": 2})]
)
def test_a_folder_that_is_not_there_is_refused(ask: Any) -> None:
    with pytest.raises(MixtureError, match=r"'dogs', which has no pictures; did you mean dog\? \(folders: dog, rug\)"):
        ask(pictures(dog=1, rug=1))


def test_the_folder_is_that_of_the_source_file(tmp_path: Path) -> None:
    line = '{"file": "a.png", "name": "%s", "sha256": "0", "caption": "", "mask": null, "width": 8, "height": 8, '
    line += '"bucket": [8, 8], "source": "%s"}\n'
    (tmp_path / "dataset.jsonl").write_text(line % ("a", "sets/dog/a.png") + line % ("b", "b.png"))
    assert [item.folder for item in read_manifest(tmp_path / "dataset.jsonl")] == ["sets/dog", "."]


def test_tags_move_and_the_first_ones_stay() -> None:
    caption = "TOK,  red hat, snow , a tree, night"
    seen = {varied(caption, Tags(2, shuffle=True), "TOK", seed) for seed in range(200)}
    assert len(seen) == 6  # of three parts
    for text in seen:
        first, second, *rest = text.split(", ")
        assert (first, second, sorted(rest)) == ("TOK", "red hat", ["a tree", "night", "snow"])
    assert varied("no commas here", Tags(0, shuffle=True), "TOK", 1) == "no commas here"
    assert varied("a, b", Tags(9, shuffle=True), "TOK", 1) == "a, b"
    assert len({varied(caption, Tags(0, shuffle=True), "TOK", seed) for seed in range(2000)}) == 120


def test_each_showing_has_its_own_order_and_an_index_the_same_for_ever() -> None:
    of = [replace(item, caption="TOK, a, b, c, d") for item in pictures(dog=4)]
    options: dict[str, Any] = {"batch_size": 2, "seed": 0, "tags": Tags(1, shuffle=True)}
    one, other = (Dataset(of, latents(of), **options) for _ in range(2))
    captions = [one.micro(i).captions for i in range(12)]
    assert len({caption for row in captions for caption in row}) > 12
    assert [other.micro(i).captions for i in reversed(range(12))] == captions[::-1]
    assert Dataset(of, latents(of), batch_size=2, seed=0).micro(0).captions == ("TOK, a, b, c, d",) * 2


def args(base: Path, source: Path, out: Path, **data: Any) -> TrainArgs:
    tree = {
        "data": {"source": str(source), "resolution": 32, "caption_dropout": 0, **data},
        "model": {"base": str(base)},
        "sample": {"steps": 1},
        "hooks": {"tensorboard": False},
        "runtime": {"out": str(out), "steps": 1, "batch_size": 2, "device": "cpu"},
    }
    return TrainArgs.model_validate(tree)


def test_a_weight_scales_the_loss_of_a_run(tmp_path: Path, tiny_base: Path, tiny_pictures: Path) -> None:
    losses: list[dict[str, float]] = []
    for name, data in {"plain": {}, "half": {"weights": {".": 0.5}}}.items():
        with opened(args(tiny_base, tiny_pictures, tmp_path / name, **data)) as session:
            samples = session.run.dataset.micro(0)
            assert (samples.weight is None) == (name == "plain")
            step = next(iter(session.steps()))
            losses.append({"loss": step.loss, **step.terms})
    assert losses[1]["loss"] == pytest.approx(0.5 * losses[0]["loss"], rel=1e-5)
    assert losses[1]["raw"] == losses[0]["raw"]


def test_shuffled_captions_reach_the_encoder_and_fill_no_cache(
    tmp_path: Path, tiny_base: Path, tiny_pictures: Path
) -> None:
    shuffle = args(tiny_base, tiny_pictures, tmp_path, shuffle_tags=True, caption="{trigger}, a, b, c")
    with opened(shuffle) as session:
        cond = session.run.encode(["TOK, a, b"])
        torch.testing.assert_close(cond.hidden, session.run.family.encode(["TOK, a, b"]).hidden)
        assert not (session.dir.cache / "text").exists()


def test_a_misspelt_folder_stops_a_run_before_it_starts(tmp_path: Path, tiny_base: Path, tiny_pictures: Path) -> None:
    with (
        pytest.raises(RunError, match=r"data\.repeats names the folder 'dogs'"),
        opened(args(tiny_base, tiny_pictures, tmp_path, repeats={"dogs": 2})),
    ):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", [{"repeats": {"dog": 0}}, {"weights": {"dog": -1}}, {"keep_tags": -1}])
def test_bounds(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="greater than or equal to"):
        DataArgs.model_validate({"source": "x", **bad})
