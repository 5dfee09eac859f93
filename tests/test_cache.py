"""The cache: what it gives is what the family gives, and nothing stale is ever trusted."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.args import ModelArgs
from trainer.cache import TextCache, cache_latents, cache_masks
from trainer.cache.shards import Shards, digest, slug
from trainer.dataset import Item, load_mask
from trainer.models.sd15 import SD15
from trainer.share import Share
from trainer.types import Cond
from trainer.view import Augment, Version

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tiny_base: Path) -> SD15:
    return SD15.load(ModelArgs(base=str(tiny_base)), CPU)


def item(name: str = "dog", bucket: tuple[int, int] = (32, 32), sha256: str = "ab") -> Item:
    return Item(Path("dog.png"), name, sha256, "a dog", None, 40, 40, bucket)


def load(picture: Item, version: Version) -> Tensor:
    width, height = picture.bucket
    pixels = torch.linspace(-1, 1, 3 * width * height).reshape(3, height, width) * version.colours[0]
    return pixels.flip(-1) if version.mirrored else pixels


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def encoded(family: SD15, picture: Item, version: Version) -> Tensor:
    with torch.no_grad():
        return family.encode_images(load(picture, version)[None])[0]


def refuse(picture: Item, version: Version) -> Tensor:
    raise AssertionError("the cache was not used")


def test_latents_are_those_of_the_family_and_are_read_back_the_same(family: SD15, tmp_path: Path) -> None:
    pictures = [item("dog"), item("cat", sha256="cd")]
    first = cache_latents(tmp_path, pictures, family, load, CPU)
    again = cache_latents(tmp_path, pictures, family, refuse, CPU)
    expected = encoded(family, item(), Augment().version(item()))
    assert torch.equal(first["dog"], expected)
    assert torch.equal(again["dog"], expected)
    assert list(again) == ["dog", "cat"]
    assert [name.split(".")[:3] for name in names(tmp_path)] == [["dog", "", "cat"]]


def test_every_version_is_encoded_as_it_is_loaded(family: SD15, tmp_path: Path) -> None:
    augment, dog = Augment(variants=2, colour=0.3), item()
    latents = cache_latents(
        tmp_path, [dog], family, load, CPU, versions=lambda picture: augment.versions(picture, mirrored=True)
    )
    assert list(latents) == ["dog", "dog.mirrored", "dog.v1", "dog.v1.mirrored", "dog.v2", "dog.v2.mirrored"]
    for version, latent in zip(augment.versions(dog, mirrored=True), latents.values(), strict=True):
        assert torch.equal(latent, encoded(family, dog, version))
    with safe_open(next(tmp_path.iterdir()), framework="pt") as file:
        assert set(file.keys()) == set(latents)
    other = Augment(variants=2, colour=0.3, seed=1)
    cache_latents(tmp_path, [dog], family, load, CPU, versions=other.versions)
    assert len(names(tmp_path)) == 2, "other versions under the same key"


def test_one_more_picture_makes_one_small_shard_and_nothing_else(family: SD15, tmp_path: Path) -> None:
    dog, cat, fox = item("dog"), item("cat", sha256="cd"), item("fox", sha256="ef")
    cache_latents(tmp_path, [dog, fox], family, load, CPU)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    loaded: list[str] = []

    def counting(picture: Item, version: Version) -> Tensor:
        loaded.append(picture.name)
        return load(picture, version)

    latents = cache_latents(tmp_path, [dog, cat, fox], family, counting, CPU)
    assert loaded == ["cat"]
    assert list(latents) == ["dog", "cat", "fox"]
    new = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path not in before}
    assert [path.name.split(".")[0] for path in new] == ["cat"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_each_process_encodes_its_part_and_reads_the_whole(family: SD15, tmp_path: Path) -> None:
    pictures = [item(name, sha256=name) for name in "abcde"]
    loaded: dict[int, list[str]] = {0: [], 1: []}
    meet = threading.Barrier(2, timeout=120)
    gathered: dict[int, dict[str, Tensor]] = {}

    def process(rank: int) -> None:
        def counting(picture: Item, version: Version) -> Tensor:
            loaded[rank].append(picture.name)
            return load(picture, version)

        def barrier() -> None:
            meet.wait()

        share = Share(rank, 2, barrier)
        gathered[rank] = dict(cache_latents(tmp_path, pictures, family, counting, CPU, share=share))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == {0: ["a", "c", "e"], 1: ["b", "d"]}
    for rank in (0, 1):
        assert list(gathered[rank]) == list("abcde")
        assert all(torch.equal(gathered[rank][p.name], encoded(family, p, Augment().version(p))) for p in pictures)


def test_a_copy_is_encoded_once_and_what_another_process_lost_here(family: SD15, tmp_path: Path) -> None:
    loaded: list[str] = []

    def counting(picture: Item, version: Version) -> Tensor:
        loaded.append(picture.name)
        return load(picture, version)

    copies = [item("dog"), item("copy")]
    assert list(cache_latents(tmp_path / "copies", copies, family, counting, CPU)) == ["dog", "copy"]
    assert loaded == ["dog"]
    loaded.clear()
    pictures = [item(name, sha256=name) for name in "abc"]
    alone = cache_latents(tmp_path / "lost", pictures, family, counting, CPU, share=Share(1, 2))
    assert loaded == ["b", "a", "c"], "its own part, then what nobody has brought"
    assert all(torch.equal(alone[p.name], encoded(family, p, Augment().version(p))) for p in pictures)


def test_a_mask_is_the_same_in_other_colours(tmp_path: Path) -> None:
    Image.new("L", (40, 40), 200).save(tmp_path / "grey.png")
    grey = dataclasses.replace(item("grey"), mask=tmp_path / "grey.png")
    read: list[int] = []

    def counting(picture: Item, scale: int, version: Version) -> Tensor | None:
        read.append(version.number)
        return load_mask(picture, scale, version)

    masks = cache_masks(tmp_path / "cache", [grey], 8, counting, versions=Augment(variants=2, colour=0.3).versions)
    assert (list(masks), read) == (["grey", "grey.v1", "grey.v2"], [0])


def test_masks_are_cropped_like_the_pictures_and_empty_ones_count_as_a_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    Image.new("L", (40, 40), 0).save(tmp_path / "black.png")
    grey = dataclasses.replace(item("grey"), mask=tmp_path / "grey.png")
    black = dataclasses.replace(item("black"), mask=tmp_path / "black.png")
    augment = Augment(variants=1, crop=0.2)
    pictures, folder = [grey, black, item("bare")], tmp_path / "cache"
    with caplog.at_level(logging.WARNING):
        masks = cache_masks(folder, pictures, 8, load_mask, versions=augment.versions)
    assert "the mask of black is empty" in caplog.text
    assert set(masks) == {"grey", "grey.v1", "black", "black.v1"}
    for version in augment.versions(grey):
        expected = load_mask(grey, 8, version)
        assert expected is not None
        assert torch.equal(masks[f"grey{'.v1' * version.number}"], expected)
    assert not torch.equal(masks["grey"], masks["grey.v1"])
    assert torch.equal(masks["black"], torch.ones(1, 4, 4))
    Image.new("L", (40, 40), 200).save(tmp_path / "grey.png")
    torch.testing.assert_close(cache_masks(folder, [grey], 8, load_mask)["grey"], torch.full((1, 4, 4), 200 / 255))


@pytest.mark.parametrize("change", [{"sha256": "cd"}, {"bucket": (48, 32)}, {"width": 60}])
def test_another_picture_bucket_or_crop_is_another_entry(
    change: dict[str, object], family: SD15, tmp_path: Path
) -> None:
    cache_latents(tmp_path, [item()], family, load, CPU)
    cache_latents(tmp_path, [dataclasses.replace(item(), **change)], family, load, CPU)  # type: ignore[arg-type]
    assert len(names(tmp_path)) == 2


def test_a_crop_that_sits_elsewhere_is_another_entry(family: SD15, tmp_path: Path) -> None:
    wide = dataclasses.replace(item(), width=60)
    cache_latents(tmp_path, [wide], family, load, CPU)
    cache_latents(tmp_path, [dataclasses.replace(wide, centering=(0.2, 0.5))], family, load, CPU)
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
    assert names(tmp_path) == set()
    text.flush()
    assert torch.equal(TextCache(tmp_path, counting, CPU)(captions).hidden, expected)  # type: ignore[arg-type]
    assert counting.asked == ["a red star", ""]
    assert [name.split(".")[:3] for name in names(tmp_path)] == [["a_red_star", "", "empty"]]


def test_captions_that_are_prepared_are_on_disk_in_parts_that_each_rank_made(family: SD15, tmp_path: Path) -> None:
    captions = ["a star", "a square", "a circle", "a star"]
    parts = [Counting(family), Counting(family)]
    for rank, counting in enumerate(parts):
        TextCache(tmp_path, counting, CPU).prepare(captions, Share(rank, 2))  # type: ignore[arg-type]
    assert [counting.asked for counting in parts] == [["a star", "a circle"], ["a square"]]
    reader = Counting(family)
    cond = TextCache(tmp_path, reader, CPU)(captions)  # type: ignore[arg-type]
    assert torch.equal(cond.hidden, torch.cat([family.encode([caption]).hidden for caption in captions]))
    assert reader.asked == []


def test_who_prepared_its_part_of_the_captions_reads_those_of_the_others(family: SD15, tmp_path: Path) -> None:
    captions = ["a star", "a square", "a circle"]

    def other() -> None:
        TextCache(tmp_path, family, CPU).prepare(captions, Share(1, 2))

    counting = Counting(family)
    text = TextCache(tmp_path, counting, CPU)  # type: ignore[arg-type]
    text.prepare(captions, Share(0, 2, other))
    assert torch.equal(text(captions).hidden, torch.cat([family.encode([caption]).hidden for caption in captions]))
    assert counting.asked == ["a star", "a circle"]


def test_what_the_cache_keeps_in_memory_is_bounded(family: SD15, tmp_path: Path) -> None:
    one = family.encode([""]).hidden.nbytes
    counting = Counting(family)
    text = TextCache(tmp_path, counting, CPU, memory=2 * one)  # type: ignore[arg-type]
    for caption in ["a", "b", "a", "c", "a"]:
        text([caption])
    assert list(text._conds) == ["c", "a"]  # pyright: ignore[reportPrivateUsage]
    assert text._bytes == 2 * one  # pyright: ignore[reportPrivateUsage]
    assert torch.equal(text(["b"]).hidden, family.encode(["b"]).hidden)
    assert counting.asked == ["a", "b", "c"], "what was dropped from memory was encoded again"


def test_another_tokenizer_or_text_encoder_is_another_entry(
    family: SD15, tiny_base: Path, tiny_base_deep: Path, tmp_path: Path
) -> None:
    TextCache(tmp_path, family, CPU).prepare(["a star"])
    TextCache(tmp_path, SD15.load(ModelArgs(base=str(tiny_base_deep)), CPU), CPU).prepare(["a star"])
    assert len(names(tmp_path)) == 2
    shorter = SD15.load(ModelArgs(base=str(tiny_base)), CPU)
    shorter.tokenizers["text_encoder"].model_max_length = 16
    TextCache(tmp_path, shorter, CPU).prepare(["a star"])
    assert len(names(tmp_path)) == 3


def entry(n: int, size: int = 3) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    return f"p{n}", {"picture": n}, {"x": torch.full((size,), float(n))}


def filled(folder: Path, count: int, **limits: int) -> Shards:
    shards = Shards(folder, **limits)
    for n in range(count):
        shards.add(*entry(n))
    shards.flush()
    return shards


def test_a_shard_is_closed_by_its_entries_or_its_bytes_and_says_what_is_in_it(tmp_path: Path) -> None:
    filled(tmp_path / "entries", 5, entries=2)
    assert sorted(name.split(".")[0] for name in names(tmp_path / "entries")) == ["p0", "p2", "p4"]
    filled(tmp_path / "bytes", 5, size=30)  # bytes; one entry has 12
    assert sorted(name.rsplit(".", 2)[0] for name in names(tmp_path / "bytes")) == ["p0..p2", "p3..p4"]
    (last,) = (path for path in (tmp_path / "bytes").iterdir() if path.name.startswith("p3"))
    with safe_open(last, framework="pt") as file:
        assert set(file.keys()) == {"p3", "p4"}
        listed = json.loads(file.metadata()["entries"])
    assert listed["p4"] == {"key": {"picture": 4}, "tensors": {"x": "p4"}}


def test_entries_are_found_by_what_they_depend_on_across_shards(tmp_path: Path) -> None:
    filled(tmp_path, 5, entries=2)
    shards = Shards(tmp_path)
    for n in range(5):
        assert torch.equal(shards.read(digest({"picture": n}))["x"], torch.full((3,), float(n)))
    assert digest({"picture": 5}) not in shards
    shards.add("p0", {"picture": "two"}, {"x": torch.zeros(1), "y": torch.ones(1)})  # names need not differ
    shards.add("p0", {"picture": "three"}, {"x": torch.ones(2), "y": torch.ones(3)})
    shards.flush()
    again = Shards(tmp_path)
    assert again.read(digest({"picture": "two"})).keys() == {"x", "y"}
    assert again.read(digest({"picture": "three"}))["y"].shape == (3,)


def test_tensors_that_are_parts_of_one_another_are_kept_apart(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    shards = Shards(tmp_path)
    for n, part in enumerate([table, table[1], table.T]):
        shards.add(f"p{n}", {"picture": n}, {"x": part})
    expected = [table.clone(), table[1].clone(), table.T.clone()]
    table.zero_()
    shards.flush()
    again = Shards(tmp_path)
    assert all(torch.equal(again.read(digest({"picture": n}))["x"], part) for n, part in enumerate(expected))


def test_what_is_not_flushed_can_be_read_and_only_that_is_lost(tmp_path: Path) -> None:
    shards = Shards(tmp_path, entries=2)
    for n in range(3):
        shards.add(*entry(n))
    assert all(digest({"picture": n}) in shards for n in range(3))
    assert float(shards.read(digest({"picture": 2}))["x"][0]) == 2
    killed = Shards(tmp_path)
    assert [digest({"picture": n}) in killed for n in range(3)] == [True, True, False]


@pytest.mark.parametrize("harm", ["cut", "garbage", "empty", "lacking"])
def test_a_damaged_shard_is_named_and_made_again(harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, 4, entries=2)
    path = next(path for path in tmp_path.iterdir() if path.name.startswith("p2"))
    whole = path.read_bytes()
    lacking = whole.replace(b'"p3"', b'"p9"')
    path.write_bytes({"cut": whole[:-4], "garbage": b"no tensors at all", "empty": b"", "lacking": lacking}[harm])
    with caplog.at_level(logging.WARNING):
        shards = Shards(tmp_path, entries=2)
        shards.scan()
    assert caplog.text.count(str(path)) == 1
    assert not path.exists(), "else each start would name it, once other shards hold what it held"
    assert [n for n in range(4) if digest({"picture": n}) not in shards] == [2, 3]
    for n in (2, 3):
        shards.add(*entry(n))
    assert path.read_bytes() == whole
    caplog.clear()
    assert all(float(Shards(tmp_path).read(digest({"picture": n}))["x"][0]) == n for n in range(4))
    assert not caplog.text


def test_files_of_others_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"latents": torch.zeros(2)}, tmp_path / "dog.0123456789abcdef.safetensors", metadata={"key": "{}"})
    filled(tmp_path, 1)
    assert digest({"picture": 0}) in Shards(tmp_path)
    assert not caplog.text
    (tmp_path / "mine.safetensors").write_bytes(b"of another program")
    assert digest({"picture": 0}) in Shards(tmp_path)
    assert (tmp_path / "mine.safetensors").exists(), "only what is named as a shard is the cache's to delete"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux shows them")
def test_shards_are_mapped_and_hold_neither_files_nor_memory(tmp_path: Path) -> None:
    shards = Shards(tmp_path, entries=1)
    for n in range(40):
        shards.add(*entry(n, size=2**18))  # 1 MiB each
    assert not held(tmp_path)
    reader = Shards(tmp_path)
    private = rss("RssAnon")
    total = sum(float(reader.read(digest({"picture": n}))["x"].sum()) for n in range(40))
    assert total == sum(range(40)) * 2**18
    assert rss("RssAnon") - private < 8 * 2**20
    assert not held(tmp_path)


def held(folder: Path) -> list[str]:
    """Files of the folder that this process has open."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.startswith(str(folder))]


def rss(kind: str) -> int:
    """Bytes of this process: RssAnon is what only it holds."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def test_names_are_recognisable_and_safe() -> None:
    assert slug("my dog (1)") == "my_dog_1"
    assert slug("../../etc/passwd") == "etc_passwd"
    assert slug("") == slug("///") == "empty"
    assert slug("a" * 300) == "a" * 60
    assert slug("犬" * 300) == "犬" * 20
