"""Versions of a picture: pure, inside the picture, of its bucket's shape; SDXL's numbers as its trainers count them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from trainer.dataset import Item
from trainer.view import PLAIN, Augment, Version, cover, label, sizes


def item(size: tuple[int, int], bucket: tuple[int, int], centering: tuple[float, float] = (0.5, 0.5)) -> Item:
    return Item(Path("p.png"), "p", "ab" * 32, "a TOK", None, *size, bucket, centering)


@pytest.mark.parametrize("size", [(640, 480), (481, 641), (512, 512), (333, 1000), (64, 64), (1001, 77)])
@pytest.mark.parametrize("bucket", [(64, 64), (96, 40), (40, 96)])
@pytest.mark.parametrize("centering", [(0.5, 0.5), (0.1234, 0.9), (1.0, 0.0)])
def test_the_plain_box_is_that_of_pillow(
    size: tuple[int, int], bucket: tuple[int, int], centering: tuple[float, float]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    expected = ImageOps.fit(picture, bucket, Image.Resampling.LANCZOS, centering=centering)
    ours = picture.resize(bucket, Image.Resampling.LANCZOS, box=cover(item(size, bucket, centering)))
    assert ours.tobytes() == expected.tobytes()


def test_versions_are_pure_and_each_is_another() -> None:
    picture, augment = item((640, 480), (64, 64)), Augment(4, colour=0.2, crop=0.1, seed=7)
    versions = augment.versions(picture)
    assert versions == Augment(4, colour=0.2, crop=0.1, seed=7).versions(replace(picture, name="renamed"))
    assert versions[0] == Version(cover(picture)) == PLAIN.version(picture)
    assert len({version.box for version in versions}) == len({version.colours for version in versions}) == 5
    assert versions[1:] != replace(augment, seed=8).versions(picture)[1:]
    assert versions[1:] != augment.versions(replace(picture, sha256="cd" * 32))[1:]
    assert versions == replace(augment, variants=9).versions(picture)[:5], "more versions changed the first ones"
    both = augment.versions(picture, mirrored=True)
    assert [replace(version, mirrored=False) for version in both[1::2]] == versions == both[::2]
    assert all(version.mirrored for version in both[1::2])


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (512, 512), (65, 64)])
@pytest.mark.parametrize("bucket", [(64, 64), (96, 40)])
def test_crops_stay_in_the_picture_keep_the_shape_and_move_no_farther_than_asked(
    size: tuple[int, int], bucket: tuple[int, int]
) -> None:
    picture, most = item(size, bucket), 0.2
    left, top, right, bottom = cover(picture)
    widths: list[float] = []
    for version in Augment(100, colour=0.5, crop=most).versions(picture)[1:]:
        x0, y0, x1, y1 = version.box
        assert 0 <= x0 < x1 <= size[0]
        assert 0 <= y0 < y1 <= size[1]
        assert (x1 - x0) / (y1 - y0) == pytest.approx(bucket[0] / bucket[1])
        assert abs((x0 + x1) - (left + right)) / 2 <= most * (right - left) + 1e-9
        assert abs((y0 + y1) - (top + bottom)) / 2 <= most * (bottom - top) + 1e-9
        assert all(0.5 <= factor <= 1.5 for factor in version.colours)
        widths.append((x1 - x0) / (right - left))
    assert min(widths) == pytest.approx(1 - most, abs=0.02)
    assert max(widths) == pytest.approx(1, abs=0.02)


def test_a_picture_of_the_bucket_s_shape_has_no_crop() -> None:
    square = item((512, 512), (1024, 1024))
    assert sizes(square, PLAIN.version(square)) == (512, 512, 0, 0, 1024, 1024)


def test_a_landscape_picture_is_cropped_as_after_a_resize_that_covers() -> None:
    # 1600x1200 covers 1024x1024 at 1365.33x1024, of which 341.33 pixels are cut off.
    wide = item((1600, 1200), (1024, 1024))
    assert sizes(wide, PLAIN.version(wide)) == (1200, 1600, 0, 171, 1024, 1024)
    corner = replace(wide, centering=(0.25, 0.5))
    assert sizes(corner, PLAIN.version(corner)) == (1200, 1600, 0, 85, 1024, 1024)
    assert sizes(corner, PLAIN.version(corner, mirrored=True)) == (1200, 1600, 0, 256, 1024, 1024)
    assert sizes(wide, PLAIN.version(wide, mirrored=True)) == sizes(wide, PLAIN.version(wide))


def test_a_portrait_picture_and_a_bucket_that_is_no_square() -> None:
    # 1000x3000 covers 832x1216 at 832x2496, of which 1280 pixels are cut off.
    tall = item((1000, 3000), (832, 1216), (0.5, 0.1))
    assert sizes(tall, PLAIN.version(tall)) == (3000, 1000, 128, 0, 1216, 832)
    assert sizes(tall, PLAIN.version(tall, mirrored=True)) == (3000, 1000, 128, 0, 1216, 832)


def test_a_tighter_crop_counts_in_the_larger_picture_that_it_is_cut_from() -> None:
    # 800 of 1600 pixels fill 1024: the picture is resized to 2048x1536.
    wide = item((1600, 1200), (1024, 1024))
    version = Version((100.0, 50.0, 900.0, 850.0), 1)
    assert sizes(wide, version) == (1200, 1600, 64, 128, 1024, 1024)
    assert sizes(wide, replace(version, mirrored=True)) == (1200, 1600, 64, 896, 1024, 1024)


def test_a_picture_that_a_model_enlarged_is_called_by_the_size_that_it_had() -> None:
    wide = replace(item((1600, 1200), (1024, 1024)), original=(400, 300))
    assert sizes(wide, PLAIN.version(wide)) == (300, 400, 0, 171, 1024, 1024)


@pytest.mark.parametrize("size", [(1600, 1200), (1333, 999), (700, 701), (2000, 512)])
def test_the_centred_crop_is_that_of_the_sdxl_script_of_diffusers(size: tuple[int, int]) -> None:
    short = min(size)
    resized = [512 if side == short else int(512 * side / short) for side in size]  # torchvision's Resize(512)
    left, top = (max(0, round((side - 512) / 2.0)) for side in resized)
    picture = item(size, (512, 512))
    ours = sizes(picture, PLAIN.version(picture))
    assert abs(ours[2] - top) <= 1  # the script rounds the resized size, too
    assert abs(ours[3] - left) <= 1


def test_versions_have_names_that_tell_them_apart() -> None:
    names = [label("dog", n, mirrored=m) for n in (0, 1) for m in (False, True)]
    assert names == ["dog", "dog.mirrored", "dog.v1", "dog.v1.mirrored"]
