"""Leaves out pictures that are in the dataset already: to the pixel, or nearly.

Near means a perceptual hash (pHash, 64 bits) a few bits away and colours that are close too: the hash itself sees
only grey. Pictures with hardly any structure have no meaningful hash and are compared by their pixels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocess.types import Item, Skipped

VERSION = 1  # raise it when the same pictures would lose another one

_THUMB = 8  # pixels; side of the square in which colours are compared
_COLOUR = 12.0  # of 255; mean difference of two thumbnails of one scene, saved twice, stays well below
_FLAT = 4.0  # of 255; standard deviation of grey below which a hash is that of noise


def deduped(items: Sequence[Item], root: Path, *, bits: int | None) -> tuple[list[Item], list[Skipped]]:
    """The items without copies, in their order, and what was left out with the picture that it is a copy of.

    Of copies the one with its own caption stays, then the one with a mask, then the larger, then the first.

    Args:
        root: folder that the items' files are relative to.
        bits: of 64; how far apart the hashes of near-duplicates may be. None drops exact copies only.
    """
    ranked = sorted(range(len(items)), key=lambda i: _rank(items[i], i))
    original = _exact(items, ranked)
    if bits is not None:
        left = [i for i in ranked if i not in original]
        original |= _near(items, left, root, bits)
    skipped = [Skipped(items[i].source, f"it is {how} {items[of].source}") for i, (of, how) in sorted(original.items())]
    return [item for i, item in enumerate(items) if i not in original], skipped


def _rank(item: Item, index: int) -> tuple[bool, bool, int, int]:
    return not item.caption, item.mask is None, -item.width * item.height, index


def _exact(items: Sequence[Item], ranked: Sequence[int]) -> dict[int, tuple[int, str]]:
    """Index of a copy -> (index of what it is a copy of, in words)."""
    first: dict[str, int] = {}
    copies: dict[int, tuple[int, str]] = {}
    for i in ranked:
        of = first.setdefault(items[i].sha256, i)
        if of != i:
            copies[i] = of, "the same picture as"
    return copies


def _near(items: Sequence[Item], ranked: Sequence[int], root: Path, bits: int) -> dict[int, tuple[int, str]]:
    """As _exact. Everything is compared with what stays, never with what goes, so that likeness does not creep."""
    hashes = np.zeros(len(ranked), dtype=np.uint64)
    thumbs = np.zeros((len(ranked), 3 * _THUMB * _THUMB), dtype=np.uint8)
    kept: list[int] = []  # indices of items, in step with the rows of hashes and thumbs
    copies: dict[int, tuple[int, str]] = {}
    for i in ranked:
        seen = _look(root / items[i].file)
        if seen is None:
            continue
        fingerprint, thumb = seen
        rows = np.flatnonzero(np.bitwise_count(hashes[: len(kept)] ^ fingerprint) <= bits)
        apart = np.abs(thumbs[rows].astype(np.int16) - thumb).mean(axis=1)
        alike = rows[apart <= _COLOUR]
        if len(alike):
            of = int(alike[0])
            distance = int(np.bitwise_count(hashes[of] ^ fingerprint))
            copies[i] = kept[of], f"nearly the same picture ({distance} of 64 bits differ) as"
        else:
            hashes[len(kept)], thumbs[len(kept)] = fingerprint, thumb
            kept.append(i)
    return copies


def _look(path: Path) -> tuple[np.uint64, NDArray[np.uint8]] | None:
    """The perceptual hash and the colours of a picture; None for one without structure."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").resize((64, 64), Image.Resampling.BOX)
    if float(np.asarray(small.convert("L")).std()) < _FLAT:
        return None
    raised = np.packbits(imagehash.phash(small).hash.ravel()).view(">u8")[0]
    thumb = np.asarray(small.resize((_THUMB, _THUMB), Image.Resampling.BOX), dtype=np.uint8)
    return np.uint64(raised), thumb.ravel()
