"""Copies among the pictures: which are seen, which of them stays, and what is said of the others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from preprocess import Item, PreprocessError, build, dedupe
from preprocess.dedupe import deduped
from preprocess.stagecache import Ledger
from trainer.args import DataArgs
from trainer.rundir import RunDir


def scene(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A smooth random picture, unlike that of any other seed."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def put(folder: Path, pictures: dict[str, Image.Image]) -> list[Item]:
    folder.mkdir(exist_ok=True)
    items: list[Item] = []
    for name, image in pictures.items():
        image.save(folder / f"{name}.png")
        pixels = f"{image.size} {image.convert('RGB').tobytes().hex()}"
        items.append(Item(name, f"{name}.png", pixels, *image.size, f"{name}.png"))
    return items


def names(items: list[Item]) -> list[str]:
    return [item.name for item in items]


def data(source: Path, **options: Any) -> DataArgs:
    return DataArgs.model_validate({"source": str(source), **options})


def test_exact_copies_go_and_near_ones_stay(tmp_path: Path) -> None:
    again = scene(0).copy()
    items = put(tmp_path, {"a": scene(0), "b": scene(1), "c": again, "small": scene(0).resize((60, 45))})
    kept, skipped = deduped(items, tmp_path, bits=None)
    assert names(kept) == ["a", "b", "small"]
    assert [(skip.file, skip.reason) for skip in skipped] == [("c.png", "it is the same picture as a.png")]


def test_near_copies_go_and_others_stay(tmp_path: Path) -> None:
    first = scene(0)
    items = put(
        tmp_path,
        {
            "small": first.resize((60, 45), Image.Resampling.LANCZOS),
            "first": first,
            "saved_again": jpeg(first, 30),
            "brighter": ImageEnhance.Brightness(first).enhance(1.05),
            "mirrored": ImageOps.mirror(first),
            "other": scene(1),
            "red_for_blue": Image.merge("RGB", first.split()[::-1]),
        },
    )
    kept, skipped = deduped(items, tmp_path, bits=6)
    assert names(kept) == ["first", "mirrored", "other", "red_for_blue"]
    assert {skip.file for skip in skipped} == {"small.png", "saved_again.png", "brighter.png"}
    assert all(
        skip.reason.startswith("it is nearly the same picture (") and skip.reason.endswith("as first.png")
        for skip in skipped
    )


def test_the_hash_alone_would_take_another_colour_for_a_copy(tmp_path: Path) -> None:
    """The reason for the comparison of colours: grey of the two is the same."""
    grey = np.asarray(scene(3).convert("L"), dtype=np.float64)
    red = np.stack([grey * 0.9, grey * 0.0, grey * 0.0], -1)
    green = np.stack([grey * 0.0, grey * 0.9 * 0.299 / 0.587, grey * 0.0], -1)  # as bright as the red
    items = put(tmp_path, {"red": Image.fromarray(red.astype("u1")), "green": Image.fromarray(green.astype("u1"))})
    assert names(deduped(items, tmp_path, bits=6)[0]) == ["red", "green"]


def test_flat_pictures_are_compared_by_their_pixels_alone(tmp_path: Path) -> None:
    colours = {"a": (200, 0, 0), "b": (201, 0, 0), "c": (200, 0, 0)}
    items = put(tmp_path, {name: Image.new("RGB", (32, 32), colour) for name, colour in colours.items()})
    assert names(deduped(items, tmp_path, bits=20)[0]) == ["a", "b"]


def test_likeness_does_not_creep(tmp_path: Path) -> None:
    """Each step of a fade is nearly the one before, and its ends are different pictures."""
    steps = {f"{i:02d}": Image.blend(scene(0), scene(1), i / 20) for i in range(21)}
    kept = names(deduped(put(tmp_path, steps), tmp_path, bits=6)[0])
    assert kept[0] == "00"
    assert 3 <= len(kept) < 15


def test_of_copies_the_one_that_says_most_stays(tmp_path: Path) -> None:
    items = put(tmp_path, {"a": scene(0), "b": scene(0), "c": scene(0)})
    told = [items[0], Item(**{**vars(items[1]), "mask": "m.png"}), Item(**{**vars(items[2]), "caption": "a dog"})]
    assert names(deduped(told, tmp_path, bits=None)[0]) == ["c"]
    assert names(deduped(told[:2], tmp_path, bits=None)[0]) == ["b"]


@pytest.mark.parametrize(("how", "left"), [("off", 4), ("exact", 3), ("near", 2)])
def test_the_option(how: str, left: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, {"a": scene(0), "b": scene(0), "c": scene(0).resize((60, 45)), "d": scene(1)})
    report = build(str(source), tmp_path / "run", data(source, dedupe=how), resolution=32, step=8)
    assert len(report.items) == left
    rows = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["b.png", "c.png"][: 4 - left]
    assert len(list(source.iterdir())) == 4


def test_bits_widen_what_is_near(tmp_path: Path) -> None:
    other = Image.blend(scene(0), scene(1), 0.1)
    items = put(tmp_path, {"a": scene(0), "b": other})
    left = [len(deduped(items, tmp_path, bits=bits)[0]) for bits in (0, 20)]
    assert left == [2, 1]


Seen = tuple[int, "np.ndarray[Any, Any]"]  # hash, colours


def seen(rng: np.random.Generator) -> list[Seen]:
    """Thousands of random looks, most of them near an earlier one; a hundred of one hash in different colours."""
    looks: list[Seen] = []
    for index in range(2500):
        fingerprint, colours = int(rng.integers(0, 2**64, dtype=np.uint64)), rng.integers(0, 256, 192, dtype=np.uint8)
        if index % 5:
            fingerprint, colours = looks[int(rng.integers(index))]
            for bit in rng.choice(64, int(rng.integers(0, 10)), replace=False):
                fingerprint ^= 1 << int(bit)
            reach = int(rng.integers(1, 32))  # mean distance of colours: half of it
            colours = np.clip(colours + rng.integers(-reach, reach + 1, 192), 0, 255).astype(np.uint8)
        looks.append((fingerprint, colours))
    for _ in range(100):
        looks.append((looks[0][0], rng.integers(0, 256, 192, dtype=np.uint8)))
    return [*looks, *looks[-9:]]


def plainly(looks: list[Seen], bits: int) -> dict[int, int]:
    """Index of a copy -> of what: each is compared with all that stay, the first first."""
    stay: list[int] = []
    copies: dict[int, int] = {}
    for i, (fingerprint, colours) in enumerate(looks):
        for j in stay:
            near = (fingerprint ^ looks[j][0]).bit_count() <= bits
            if near and np.mean(np.abs(colours.astype(float) - looks[j][1])) <= 12:
                copies[i] = j
                break
        else:
            stay.append(i)
    return copies


@pytest.mark.parametrize("bits", [0, 6, 10])
def test_thousands_are_compared_as_one_by_one(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedupe, "_BLOCK", 8)
    looks = seen(np.random.default_rng(bits))
    with Ledger(RunDir(tmp_path).kept, "looks") as ledger:  # so that no picture need be there
        for index, (fingerprint, colours) in enumerate(looks):
            look = {"hash": fingerprint.to_bytes(8).hex(), "thumb": colours.tobytes().hex()}
            ledger.put(f"{index}", {"version": dedupe.VERSION, **look})
    items = [Item(f"{index}", "", f"{index}", 9, 9, f"{index}") for index in range(len(looks))]
    kept, skipped = deduped(items, tmp_path, bits=bits)
    expected = plainly(looks, bits)
    assert 100 < len(expected) < len(looks) - 1000
    assert {int(skip.file): int(skip.reason.split()[-1]) for skip in skipped} == expected
    assert [int(item.name) for item in kept] == [index for index in range(len(looks)) if index not in expected]


def test_nothing_but_copies_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, {"a": scene(0), "b": scene(0)})
    with pytest.raises(PreprocessError, match=r"all pictures are copies of a\.png.*b\.png: .*set data\.dedupe to off"):
        build(str(source), tmp_path / "run", data(source), resolution=32, step=8)
