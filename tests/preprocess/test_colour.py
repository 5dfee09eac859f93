"""Colour profiles: what they mean is checked against the formulas of their spaces."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
from PIL import Image, ImageCms

from preprocess import Limits
from preprocess.picture import decode, decode_mask

LIMITS = Limits()


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and blue exchanged: a pure red in it is blue."""
    profile = bytearray(srgb_profile())
    count = int.from_bytes(profile[128:132], "big")
    tags = {bytes(profile[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(count)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def linear_profile() -> bytes:
    """sRGB's primaries with a curve of gamma 1."""
    profile = bytearray(srgb_profile())
    count = int.from_bytes(profile[128:132], "big")
    for n in range(count):
        at = 132 + 12 * n
        if profile[at : at + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            offset = int.from_bytes(profile[at + 4 : at + 8], "big")
            profile[offset : offset + 12] = b"curv" + bytes(8)  # no points: the identity
    return bytes(profile)


def test_a_profile_of_srgb_changes_nothing() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = decode(encode(Image.fromarray(colours), icc_profile=srgb_profile()), LIMITS)
    assert np.abs(np.asarray(image, dtype=int) - colours).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_primaries_are_those_of_the_profile(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(Image.new("RGB", (32, 32), (255, 0, 0)), kind, icc_profile=swapped_profile(), **options)
    assert np.abs(np.asarray(decode(content, LIMITS).getpixel((3, 3))) - (0, 0, 255)).max() <= 1


def test_a_linear_curve_is_undone() -> None:
    values = np.arange(16, 256, 16)
    ramp = np.repeat(np.repeat(values[None, :, None], 16, 0), 3, 2).astype(np.uint8).repeat(2, 1)
    image = decode(encode(Image.fromarray(ramp), icc_profile=linear_profile()), LIMITS)
    light = values / 255
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(np.asarray(image)[4, ::2, 1] - expected).max() <= 1.5


def test_transparency_survives_a_profile() -> None:
    layer = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    layer.paste((255, 0, 0, 255), (0, 0, 16, 32))
    image = decode(encode(layer, icc_profile=swapped_profile()), LIMITS)
    assert [image.getpixel(at) for at in ((0, 0), (31, 0))] == [(0, 0, 255), (255, 255, 255)]


def test_a_palette_with_a_profile() -> None:
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([255, 0, 0])
    assert decode(encode(palette, icc_profile=swapped_profile()), LIMITS).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("profile", "words"),
    [(b"no profile", "is ignored"), (swapped_profile()[:200], "damaged"), (b"\xff" * 4000, "is ignored")],
)
def test_a_profile_that_cannot_be_used_is_named_and_ignored(
    caplog: pytest.LogCaptureFixture, profile: bytes, words: str
) -> None:
    with caplog.at_level(logging.WARNING):
        image = decode(encode(Image.new("RGB", (32, 32), (200, 100, 50)), icc_profile=profile), LIMITS)
    assert image.getpixel((0, 0)) == (200, 100, 50)
    assert words in caplog.text


def test_a_profile_of_another_space_is_ignored() -> None:
    content = encode(Image.new("L", (32, 32), 77), icc_profile=swapped_profile())
    assert decode(content, LIMITS).getpixel((0, 0)) == (77, 77, 77)


def test_a_mask_is_no_colour() -> None:
    content = encode(Image.new("RGB", (32, 32), (77, 77, 77)), icc_profile=linear_profile())
    assert decode_mask(content, LIMITS, (32, 32)).getpixel((0, 0)) == 77
    assert decode(content, LIMITS).getpixel((0, 0)) != (77, 77, 77)
