"""Decodes one picture of unknown origin into upright 8-bit RGB, or says why it cannot.

What a file is, its content decides, never its suffix. Only formats whose decoders are plain readers are tried:
none that start another program.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from preprocess import heif
from preprocess.colour import to_srgb
from preprocess.types import Limits, PictureError, too_large

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")  # and HEIC with an extra

# What Pillow's decoders raise on damaged or hostile content.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)


def decode(content: bytes, limits: Limits) -> Image.Image:
    """The first frame, turned upright as EXIF asks, transparency on white, as 8-bit RGB in the colours of sRGB.

    Raises:
        PictureError: no picture, damaged, too large or too small.
    """
    image = _load(content, limits, lambda image: _rgb(to_srgb(image), (255, 255, 255)))
    if min(image.size) < limits.side:
        raise PictureError(
            f"it is {image.width} x {image.height} pixels, and each side must have at least {limits.side} "
            "(data.limits.side)"
        )
    return image


def looks_like_picture(file: IO[bytes]) -> bool:
    """Whether the content begins like a picture; the rest of it is not looked at."""
    file.seek(0)
    if heif.is_heif(file.read(heif.START)):
        return True
    file.seek(0)
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True  # `decode` says how large it may be
    except _DAMAGE:
        return False


def formats_of(content: bytes, limits: Limits) -> tuple[str, ...]:
    """The formats, as Pillow calls them, that `content` may be opened as.

    Raises:
        PictureError: it is of a format whose extra is not installed, or already says that it is too large.
    """
    if not heif.is_heif(content[: heif.START]):
        return FORMATS
    heif.prepare(content, limits)
    return ("HEIF",)


def decode_mask(content: bytes, limits: Limits, size: tuple[int, int]) -> Image.Image:
    """A mask as 8-bit grey of `size` (width, height); transparent counts as black.

    Raises:
        PictureError: as decode; also another size than the picture's.
    """
    try:
        mask = _load(content, limits, lambda image: _rgb(image, (0, 0, 0))).convert("L")
    except PictureError as error:
        raise PictureError(f"its mask cannot be used: {error}") from error
    if mask.size != size:
        raise PictureError(f"its mask is {mask.width} x {mask.height} pixels, but the picture is {size[0]} x {size[1]}")
    return mask


def decode_alpha(content: bytes, limits: Limits) -> Image.Image | None:
    """What the picture shows (white) and hides (black), as 8-bit grey, upright; None when it hides nothing.

    Raises:
        PictureError: as decode.
    """
    alpha = _load(content, limits, _alpha)
    return None if alpha.getextrema() == (255, 255) else alpha


def _alpha(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF" or not image.has_transparency_data:  # in those a colour cannot stand for transparent
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _load(content: bytes, limits: Limits, finish: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `finish` makes of the decoded, upright picture. Its size is checked before a pixel is unpacked."""
    formats = formats_of(content, limits)
    try:
        with Image.open(io.BytesIO(content), formats=formats) as probe:
            width, height = probe.size
            if width * height > limits.pixels:
                raise PictureError(too_large(width, height, limits))
            probe.verify()  # checksums, where the format has them; the file must be opened anew after it
        with Image.open(io.BytesIO(content), formats=formats) as image:
            image.load()
            return finish(ImageOps.exif_transpose(image))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"it has too many pixels: {limits.pixels} are allowed (data.limits.pixels)") from error
    except UnidentifiedImageError as error:
        if zipfile.is_zipfile(io.BytesIO(content)):
            raise PictureError("it is an archive, and archives inside a source are not opened") from error
        if formats != FORMATS:
            raise PictureError(f"it is damaged: no {formats[0]} picture begins so") from error
        raise PictureError(f"it is no picture in a format that is read here ({', '.join(FORMATS)}, HEIC)") from error
    except _DAMAGE as error:
        raise PictureError(f"it is damaged: {error or type(error).__name__}") from error


def _rgb(image: Image.Image, behind: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image).convert("RGB")
    if image.mode == "F":
        raise PictureError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (*behind, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """8-bit grey from 16-bit grey. (Pillow's own conversion would cut all above 255 off.)"""
    values = np.asarray(image, dtype=np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise PictureError("its pixels are 32-bit integers of unknown range; save it with 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
