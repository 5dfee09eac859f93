"""Several resolutions, the crop around a mask, and what is said of pictures that a bucket does harm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from preprocess import Item, build
from preprocess.buckets import bucketed, cropped, focused, remarks, sizes
from trainer.args import DataArgs
from trainer.dataset import load_mask, load_pixels, read_manifest


def item(width: int, height: int, **fields: Any) -> Item:
    return replace(Item("a", "a.png", "0" * 64, width, height, "a.png"), **fields)


def data(**options: Any) -> DataArgs:
    return DataArgs.model_validate({"source": "", **options})


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((511, 511), (512, 512)),  # too small for any: the smallest
        ((512, 512), (512, 512)),
        ((767, 900), (704, 832)),  # fills this one of 768's, though not its square
        ((768, 768), (768, 768)),
        ((1023, 5000), (768, 1344)),
        ((1024, 1024), (1024, 1024)),
        ((4000, 4000), (1024, 1024)),
    ],
)
def test_a_picture_gets_the_largest_resolution_that_it_fills(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    choices = [sizes(side, 64) for side in (512, 768, 1024)]
    found = bucketed(item(*size), *choices)
    assert found.bucket == bucket
    assert found.bucket in choices[0] or (found.bucket[0] <= size[0] and found.bucket[1] <= size[1])


def test_several_resolutions_make_one_dataset(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, side in {"small": 40, "middle": 70, "large": 130}.items():
        Image.new("RGB", (side, side), "blue").save(source / f"{name}.png")
    report = build(str(source), tmp_path / "run", data(), resolution=(128, 32, 64), step=16)
    buckets = {row.name: row.bucket for row in report.items}
    assert buckets == {"small": (32, 32), "middle": (64, 64), "large": (128, 128)}
    for row in read_manifest(tmp_path / "run/dataset.jsonl"):
        assert load_pixels(row).shape[1:] == row.bucket[::-1]


def thirds(folder: Path, white: slice) -> Path:
    """A picture of a red, a green and a blue third, thrice as wide as high, and its mask."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, :32, 0], pixels[:, 32:64, 1], pixels[:, 64:, 2] = 255, 255, 255
    mask = np.zeros((32, 96), np.uint8)
    mask[:, white] = 255
    folder.mkdir()
    for name in ("a", "b"):  # two of them: a dataset is no single picture
        Image.fromarray(pixels if name == "a" else np.roll(pixels, 7, axis=0) // 2).save(folder / f"{name}.png")
        Image.fromarray(mask).save(folder / f"{name}.mask.png")
    return folder


@pytest.mark.parametrize(
    ("white", "colour"),
    [(slice(0, 20), 0), (slice(40, 56), 1), (slice(64, 96), 2), (slice(90, 96), 2), (slice(0, 0), 1)],
)
def test_the_crop_follows_the_mask(white: slice, colour: int, tmp_path: Path) -> None:
    source = thirds(tmp_path / "source", white)
    options = data(masks=True, crop="mask")
    build(str(source), tmp_path / "run", options, resolution=32, step=32)
    (first, _) = read_manifest(tmp_path / "run/dataset.jsonl")
    expected = torch.full((3, 32, 32), -1.0)
    expected[colour] = 1.0
    assert torch.equal(load_pixels(first), expected)
    mask = load_mask(first, 8)
    assert (mask is None) == (white == slice(0, 0)), "the mask moves with its picture"


def test_by_default_the_middle_is_kept(tmp_path: Path) -> None:
    source = thirds(tmp_path / "source", slice(30, 64))
    build(str(source), tmp_path / "run", data(masks=True), resolution=32, step=32)
    rows = [json.loads(line) for line in (tmp_path / "run/dataset.jsonl").read_text().splitlines()]
    assert [row["centering"] for row in rows] == [[0.5, 0.5]] * 2
    assert bool((load_pixels(read_manifest(tmp_path / "run/dataset.jsonl")[0])[1] == 1).all())


def test_the_centroid_is_in_the_middle_where_the_picture_reaches(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        width, height = (int(n) for n in rng.integers(40, 200, 2))
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        mask = np.zeros((height, width), np.uint8)
        mask[y, x] = 255
        Image.fromarray(mask).save(tmp_path / "m.png")
        moved = focused([item(width, height, mask="m.png", bucket=(64, 48))], tmp_path)[0]
        left, top, right, bottom = cropped(moved)
        assert -1e-9 <= left < right <= width + 1e-9
        assert -1e-9 <= top < bottom <= height + 1e-9
        assert (right - left) / (bottom - top) == pytest.approx(64 / 48)
        for low, high, middle, whole in ((left, right, x + 0.5, width), (top, bottom, y + 0.5, height)):
            reach = min(max(middle, (high - low) / 2), whole - (high - low) / 2)
            assert abs((low + high) / 2 - reach) <= (0.5 if whole - (high - low) < 1 else 0.02)


def test_the_crop_that_is_told_is_the_crop_that_is_trained(tmp_path: Path) -> None:
    """`cropped` against the pixels: the box, cut and scaled by hand, is what the dataset loads."""
    pixels = np.random.default_rng(1).integers(0, 256, (50, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    told = item(120, 50, bucket=(32, 32), centering=(0.8, 0.5))
    (tmp_path / "dataset.jsonl").write_text(json.dumps(told.line({})))
    box = cropped(told)
    assert box == (56.0, 0.0, 106.0, 50.0)
    by_hand = Image.fromarray(pixels).resize((32, 32), Image.Resampling.LANCZOS, box=box)
    loaded = load_pixels(read_manifest(tmp_path / "dataset.jsonl")[0])
    assert torch.equal(loaded, torch.from_numpy(np.asarray(by_hand, np.float32)).permute(2, 0, 1) / 127.5 - 1)


def test_pictures_that_are_enlarged_too_much_are_named() -> None:
    small = item(64, 64, bucket=(192, 192))
    assert remarks(small, 3.0) == []
    (told,) = remarks(small, 2.5)
    assert told.startswith("a.png: its 64 x 64 pixels are enlarged 3.0 times to fit 192 x 192")
    assert "data.upscale_limit is 2.5" in told


def test_a_picture_that_is_both_cut_and_enlarged_is_told_both() -> None:
    both = remarks(item(400, 40, bucket=(128, 64)), 1.0)
    assert [("cut off" in note, "enlarged" in note) for note in both] == [(True, False), (False, True)]


def test_the_warning_reaches_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "source").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"source/{name}.png")
    quiet = build(str(tmp_path / "source"), tmp_path / "quiet", data(upscale_limit=4), resolution=128, step=16)
    assert (quiet.notes, caplog.records) == ((), [])
    told = build(str(tmp_path / "source"), tmp_path / "told", data(upscale_limit=3.9), resolution=128, step=16)
    assert ["enlarged 4.0 times" in note for note in told.notes] == [True, True]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == list(told.notes)


def test_a_crop_around_masks_needs_masks() -> None:
    with pytest.raises(ValidationError, match=r"data.crop mask needs masks, but data.masks is off"):
        data(crop="mask")
