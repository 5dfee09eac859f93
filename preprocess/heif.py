"""HEIC and HEIF, which Pillow reads with a plugin of its own: telling them apart, and how large they may become."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator

from preprocess.types import Limits, PictureError, too_large
from trainer.extras import needed

START = 512  # bytes of a file that tell what it is
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF = {b"avif", b"avis"}
_GENERAL = {b"mif1", b"msf1"}
_INSIDE = {b"meta": 4, b"iprp": 0, b"ipco": 0}  # boxes that lead to sizes -> bytes before the boxes in them
_SIZE = b"ispe"


def is_heif(start: bytes) -> bool:
    """Whether a file that begins so is HEIC or HEIF. AVIF, which has the same container, is not."""
    size, kind = struct.unpack(">I4s", start[:8]) if len(start) >= 12 else (0, b"")
    if kind != b"ftyp":
        return False
    brands = {start[8:12], *(start[at : at + 4] for at in range(16, min(size, len(start)), 4))}
    return start[8:12] in _HEIC | _GENERAL and not (start[8:12] in _GENERAL and brands & _AVIF and not brands & _HEIC)


def prepare(content: bytes, limits: Limits) -> None:
    """Lets Pillow open HEIF, after a look at what it would cost.

    A picture may show less than it holds, as a cut-out or a grid of tiles: every size in it counts, and its decoder
    refuses to unpack more than they say.

    Raises:
        PictureError: the plugin is not installed, or it is too large or damaged.
    """
    try:
        plugin = importlib.import_module("pillow_heif")
    except ImportError as error:
        raise PictureError(f"it is HEIC, {needed('heic')}") from error
    sizes = list(_sizes(content, 0, len(content)))
    if not sizes:
        raise PictureError("it is damaged: a HEIC that does not say its size")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    if width * height > limits.pixels:
        raise PictureError(too_large(width, height, limits))
    plugin.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)


def _sizes(content: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    """(width, height) of every picture and tile between two positions."""
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", content, at)
        inside = at + 8
        if size == 1 and inside + 8 <= end:
            size, inside = struct.unpack_from(">Q", content, inside)[0], inside + 8
        last = end if size == 0 else min(at + size, end)
        if last < inside:
            return
        if kind == _SIZE and inside + 12 <= last:
            yield struct.unpack_from(">II", content, inside + 4)
        elif kind in _INSIDE:
            yield from _sizes(content, inside + _INSIDE[kind], last)
        at = last
