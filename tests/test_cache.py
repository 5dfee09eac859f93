"""The cache: what it gives is what the family gives, and nothing stale is ever trusted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.args import ModelArgs
from trainer.cache import TextCache, cache_latents, cached, slug
from trainer.dataset import Item
from trainer.models.sd15 import SD15
from trainer.types import Cond

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tiny_base: Path) -> SD15:
    return SD15.load(ModelArgs(base=str(tiny_base)), CPU)


def item(name: str = "dog", bucket: tuple[int, int] = (32, 32), sha256: str = "ab") -> Item:
    return Item(Path("dog.png"), name, sha256, "a dog", None, 40, 40, bucket)


def load(picture: Item) -> Tensor:
    width, height = picture.bucket
    pixels = torch.linspace(-1, 1, 3 * width * height)
    return pixels.reshape(3, height, width)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refuse(picture: Item) -> Tensor:
    raise AssertionError("the cache was not used")


def test_latents_are_those_of_the_family_and_are_read_back_the_same(family: SD15, tmp_path: Path) -> None:
    first = cache_latents(tmp_path, [item()], family, load, CPU)
    again = cache_latents(tmp_path, [item()], family, refuse, CPU)
    with torch.no_grad():
        expected = family.encode_images(load(item())[None])[0]
    assert torch.equal(first["dog"], expected)
    assert torch.equal(again["dog"], expected)
    assert [name.split(".")[0] for name in names(tmp_path)] == ["dog"]


def test_mirrored_latents_are_those_of_the_mirrored_picture(family: SD15, tmp_path: Path) -> None:
    cache_latents(tmp_path, [item()], family, load, CPU)
    mirrored = cache_latents(tmp_path, [item()], family, load, CPU, mirrored=True)
    with torch.no_grad():
        assert torch.equal(mirrored["dog"], family.encode_images(load(item()).flip(-1)[None])[0])
    assert len({name.split(".")[-2] for name in names(tmp_path)}) == 2, "one key for both"


@pytest.mark.parametrize("change", [{"sha256": "cd"}, {"bucket": (48, 32)}, {"centering": (0.2, 0.5)}])
def test_another_picture_bucket_or_crop_is_another_entry(
    change: dict[str, object], family: SD15, tmp_path: Path
) -> None:
    cache_latents(tmp_path, [item()], family, load, CPU)
    cache_latents(tmp_path, [dataclasses.replace(item(), **change)], family, load, CPU)  # type: ignore[arg-type]
    assert len(names(tmp_path)) == 2


def test_another_vae_is_another_entry(family: SD15, tiny_base_deep: Path, tmp_path: Path) -> None:
    other = SD15.load(ModelArgs(base=str(tiny_base_deep)), CPU)
    mine = cache_latents(tmp_path, [item()], family, load, CPU)["dog"]
    theirs = cache_latents(tmp_path, [item()], other, load, CPU)["dog"]
    assert not torch.equal(mine, theirs)
    assert len(names(tmp_path)) == 2


class Counting:
    """A family whose encodings are counted."""

    def __init__(self, family: SD15) -> None:
        self.asked: list[str] = []
        self._family = family

    def __getattr__(self, name: str) -> object:
        return getattr(self._family, name)

    def encode(self, captions: Sequence[str]) -> Cond:
        self.asked += captions
        return self._family.encode(captions)


def test_text_is_that_of_the_family_and_encoded_once(family: SD15, tmp_path: Path) -> None:
    counting = Counting(family)
    text = TextCache(tmp_path, counting, CPU)  # type: ignore[arg-type]
    captions = ["a red star", "", "a red star"]
    cond = text(captions)
    expected = torch.cat([family.encode([caption]).hidden for caption in captions])
    assert torch.equal(cond.hidden, expected)
    assert cond.pooled is None
    assert torch.equal(TextCache(tmp_path, counting, CPU)(captions).hidden, expected)  # type: ignore[arg-type]
    assert counting.asked == ["a red star", ""]
    assert {name.split(".")[0] for name in names(tmp_path)} == {"a_red_star", "empty"}


def test_another_tokenizer_or_text_encoder_is_another_entry(
    family: SD15, tiny_base: Path, tiny_base_deep: Path, tmp_path: Path
) -> None:
    TextCache(tmp_path, family, CPU)(["a star"])
    TextCache(tmp_path, SD15.load(ModelArgs(base=str(tiny_base_deep)), CPU), CPU)(["a star"])
    assert len(names(tmp_path)) == 2
    shorter = SD15.load(ModelArgs(base=str(tiny_base)), CPU)
    shorter.tokenizers["text_encoder"].model_max_length = 16
    TextCache(tmp_path, shorter, CPU)(["a star"])
    assert len(names(tmp_path)) == 3


def make() -> dict[str, Tensor]:
    return {"x": torch.arange(3.0)}


@pytest.mark.parametrize("harm", ["cut", "garbage", "renamed"])
def test_a_damaged_or_foreign_file_is_made_again(harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached(tmp_path, "n", {"a": 1}, make)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if harm == "cut":
        path.write_bytes(whole[:-4])
    elif harm == "garbage":
        path.write_bytes(b"no tensors at all")
    else:  # a file whose name matches by accident, with other content
        cached(tmp_path, "n", {"a": 2}, lambda: {"x": torch.zeros(3)})
        (other,) = (file for file in tmp_path.iterdir() if file != path)
        other.replace(path)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached(tmp_path, "n", {"a": 1}, make)["x"], make()["x"])
    assert str(path) in caplog.text
    assert path.read_bytes() == whole


def test_names_are_recognisable_and_safe() -> None:
    assert slug("my dog (1)") == "my_dog_1"
    assert slug("../../etc/passwd") == "etc_passwd"
    assert slug("") == slug("///") == "empty"
    assert slug("a" * 300) == "a" * 60
