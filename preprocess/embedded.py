"""A caption that a program wrote into the picture's own file: EXIF, or the text chunks of PNG."""

from __future__ import annotations

import io
import logging
import struct
import zlib

from PIL import ExifTags, Image

from preprocess.captionfiles import tidy
from preprocess.picture import formats_of
from preprocess.types import Limits

# In this order; the first that says something counts. `parameters` is what image generators write.
_PNG = ("caption", "description", "title", "comment", "parameters")
_SETTINGS = ("\nNegative prompt:", "\nSteps:")  # what ends the prompt in `parameters`
_XP_TITLE, _XP_COMMENT = 0x9C9B, 0x9C9C  # UTF-16, by Windows
_CODED = {b"ASCII\0\0\0": "ascii", b"UNICODE\0": "utf-16", b"\0" * 8: "utf-8"}

_log = logging.getLogger(__name__)


def caption(content: bytes, limits: Limits) -> str:
    """The caption in a picture's file, on one line; empty when there is none or its text is damaged."""
    try:
        with Image.open(io.BytesIO(content), formats=formats_of(content, limits)) as image:
            said = [*_png(image), *_exif(image)]
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error) as error:
        _log.warning("the text inside a picture cannot be read: %s", error)
        return ""
    tidied = (tidy(text) for text in said)
    return next((text for text in tidied if text and len(text.encode()) <= limits.caption_bytes), "")


def _png(image: Image.Image) -> list[str]:
    texts = {str(key).lower(): value for key, value in image.info.items() if isinstance(value, str)}
    found = [texts[key] for key in _PNG if key in texts]
    return [_before(text, _SETTINGS) for text in found]


def _before(text: str, ends: tuple[str, ...]) -> str:
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]


def _exif(image: Image.Image) -> list[str]:
    exif = image.getexif()
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    values = [
        exif.get(ExifTags.Base.ImageDescription),
        _utf16(exif.get(_XP_TITLE)),
        _utf16(exif.get(_XP_COMMENT)),
        _coded(inner.get(ExifTags.Base.UserComment)),
    ]
    return [value for value in values if isinstance(value, str)]


def _utf16(value: object) -> str | None:
    return value.decode("utf-16-le", "replace").rstrip("\0") if isinstance(value, bytes) else None


def _coded(value: object) -> str | None:
    """EXIF's UserComment: 8 bytes that name the coding, then the text."""
    if not isinstance(value, bytes):
        return None
    coding = _CODED.get(value[:8])
    return value[8:].decode(coding, "replace").rstrip("\0") if coding else None
