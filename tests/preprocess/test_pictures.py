"""Pictures as they come: turned, transparent, CMYK, 16-bit, damaged. Pixels are compared with what they must be."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from preprocess import Limits, PictureError
from preprocess.picture import decode, decode_mask

LIMITS = Limits()


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """32 wide, 16 high: red, green over blue, white."""
    image = Image.new("RGB", (32, 16))
    for box, color in {(0, 0): "red", (16, 0): "lime", (0, 8): "blue", (16, 8): "white"}.items():
        image.paste(color, (*box, box[0] + 16, box[1] + 8))
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_every_format_that_is_promised(kind: str) -> None:
    options = {"quality": 100} if kind in ("JPEG", "WEBP", "AVIF") else {}
    image = decode(encode(Image.new("RGB", (40, 24), (200, 100, 50)), kind, **options), LIMITS)
    assert (image.mode, image.size) == ("RGB", (40, 24))
    assert np.abs(np.asarray(image, dtype=int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    turn_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = corners().transpose(turn_back[orientation]) if orientation > 1 else corners()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(stored, "PNG", exif=exif.tobytes()), LIMITS)
    assert np.array_equal(np.asarray(image), np.asarray(corners()))


def test_transparent_pixels_become_white() -> None:
    layer = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    layer.paste((0, 0, 255, 255), (0, 0, 16, 32))
    layer.paste((0, 0, 0, 128), (16, 16, 32, 32))
    image = decode(encode(layer, "PNG"), LIMITS)
    assert [image.getpixel(at) for at in ((0, 0), (31, 0), (31, 31))] == [(0, 0, 255), (255, 255, 255), (127, 127, 127)]


def test_a_palette_with_a_transparent_colour() -> None:
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.paste(1, (0, 0, 16, 32))
    image = decode(encode(palette, "PNG", transparency=0), LIMITS)
    assert (image.getpixel((0, 0)), image.getpixel((31, 0))) == ((0, 255, 0), (255, 255, 255))


def test_cmyk() -> None:
    image = decode(encode(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "TIFF"), LIMITS)
    assert image.getpixel((5, 5)) == (255, 0, 0)


def test_16_bit_grey_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    image = decode(encode(Image.fromarray(ramp), "PNG"), LIMITS)
    assert np.array_equal(np.asarray(image)[..., 1], np.round(ramp / 257).astype(np.uint8))


def test_numbers_without_a_range_are_refused() -> None:
    with pytest.raises(PictureError, match="floating-point"):
        decode(encode(Image.new("F", (32, 32), 0.5), "TIFF"), LIMITS)
    with pytest.raises(PictureError, match="32-bit integers"):
        decode(encode(Image.new("I", (32, 32), 10**6), "TIFF"), LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_a_truncated_picture_is_damaged(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = encode(noise, kind)
    with pytest.raises(PictureError, match=r"damaged|no picture"):
        decode(content[: len(content) // 2], LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of Pillow, about TIFF tags
def test_random_damage_is_either_decoded_or_named(kind: str) -> None:
    """Whatever a decoder makes of flipped bytes, only PictureError may come out."""
    chance = random.Random(0)
    content = encode(corners().resize((64, 48)), kind)
    assert decode(content, LIMITS).size == (64, 48)
    for _ in range(150):
        broken = bytearray(content)
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        try:
            image = decode(bytes(broken), LIMITS)
        except PictureError:
            continue
        assert image.mode == "RGB"


def test_a_wrong_checksum_is_damage() -> None:
    content = bytearray(encode(corners(), "PNG"))
    content[-13] ^= 1  # the last byte of the checksum of the pixels: 12 bytes of IEND follow
    with pytest.raises(PictureError, match="damaged"):
        decode(bytes(content), LIMITS)


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_unpacked() -> None:
    content = encode(Image.new("1", (3000, 2000)), "PNG")
    assert len(content) < 2000
    with pytest.raises(PictureError, match="3000 x 2000 pixels, and 1000000"):
        decode(content, Limits(pixels=1_000_000))
    gigantic = bytearray(encode(Image.new("L", (32, 32)), "BMP"))
    gigantic[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(PictureError, match="pixels"):
        decode(bytes(gigantic), LIMITS)


def test_a_tiny_picture_is_refused() -> None:
    with pytest.raises(PictureError, match="40 x 8 pixels, and each side must have at least 16"):
        decode(encode(Image.new("RGB", (40, 8)), "PNG"), LIMITS)


def test_formats_that_start_other_programs_are_not_tried() -> None:
    with pytest.raises(PictureError, match="no picture in a format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n", LIMITS)


def test_masks() -> None:
    half = Image.new("RGBA", (32, 16), (255, 255, 255, 0))
    half.paste((255, 255, 255, 255), (0, 0, 16, 16))
    mask = decode_mask(encode(half, "PNG"), LIMITS, (32, 16))
    assert (mask.mode, mask.getpixel((0, 0)), mask.getpixel((31, 0))) == ("L", 255, 0)
    with pytest.raises(PictureError, match="mask is 32 x 16 pixels, but the picture is 16 x 32"):
        decode_mask(encode(half, "PNG"), LIMITS, (16, 32))
    black = decode_mask(encode(Image.new("L", (32, 16)), "PNG"), LIMITS, (32, 16))
    assert black.getextrema() == (0, 0)  # the dataset counts it as unmasked, and says so
    with pytest.raises(PictureError, match="its mask cannot be used: it is no picture"):
        decode_mask(b"nothing", LIMITS, (32, 16))
