"""Leaves out pictures that are in the dataset already: to the pixel, or nearly.

Near means a perceptual hash (pHash, 64 bits) a few bits away and colours that are close too: the hash itself sees
only grey. Pictures with hardly any structure have no meaningful hash and are compared by their pixels alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocess.crew import Crew
from preprocess.stagecache import Ledger
from preprocess.types import Item, Skipped
from trainer.rundir import RunDir

VERSION = 1  # raise it when the same pictures would lose another one

_THUMB = 8  # pixels; side of the square in which colours are compared
_COLOUR = 12.0  # of 255; mean difference of two thumbnails of one scene, saved twice, stays well below
_BLOCK = 1024  # pictures whose colours are compared at once
_FLAT = 4.0  # of 255; standard deviation of grey below which a hash is that of noise

Look = tuple[np.uint64, NDArray[np.uint8]]  # perceptual hash, colours


def deduped(
    items: Sequence[Item], root: Path, *, bits: int | None, crew: Crew | None = None
) -> tuple[list[Item], list[Skipped]]:
    """The items without copies, in their order, and what was left out with the picture that it is a copy of.

    Of copies the one with its own caption stays, then the one with a mask, then the larger, then the first.

    Args:
        root: folder that the items' files are relative to.
        bits: of 64; how far apart the hashes of near-duplicates may be. None drops exact copies only.
        crew: looks at the pictures [default: this process].
    """
    ranked = sorted(range(len(items)), key=lambda i: _rank(items[i], i))
    original = _exact(items, ranked)
    if bits is not None:
        left = [i for i in ranked if i not in original]
        original |= _near(left, _looks([items[i] for i in left], root, crew or Crew(workers=0)), bits)
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


def _near(ranked: Sequence[int], looks: Sequence[Look | None], bits: int) -> dict[int, tuple[int, str]]:
    """As _exact. Everything is compared with what stays, never with what goes, so that likeness does not creep."""
    hashes = np.zeros(len(ranked), dtype=np.uint64)
    thumbs = np.zeros((len(ranked), 3 * _THUMB * _THUMB), dtype=np.uint8)
    kept: list[int] = []  # indices of items, in step with the rows of hashes and thumbs
    copies: dict[int, tuple[int, str]] = {}
    for i, look in zip(ranked, looks, strict=True):
        if look is None:
            continue
        fingerprint, thumb = look
        rows = np.flatnonzero(np.bitwise_count(hashes[: len(kept)] ^ fingerprint) <= bits)
        of = _first_alike(thumbs, rows, thumb)
        if of is not None:
            distance = int(np.bitwise_count(hashes[of] ^ fingerprint))
            copies[i] = kept[of], f"nearly the same picture ({distance} of 64 bits differ) as"
        else:
            hashes[len(kept)], thumbs[len(kept)] = fingerprint, thumb
            kept.append(i)
    return copies


def _first_alike(thumbs: NDArray[np.uint8], rows: NDArray[np.intp], thumb: NDArray[np.uint8]) -> int | None:
    """The first of the rows whose colours are close, looked for in blocks: thousands may have the same hash."""
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        theirs = thumbs[block]
        apart = (np.maximum(theirs, thumb) - np.minimum(theirs, thumb)).sum(axis=1, dtype=np.uint32)
        alike = block[apart <= _COLOUR * thumb.size]
        if len(alike):
            return int(alike[0])
    return None


def _looks(items: Sequence[Item], root: Path, crew: Crew) -> list[Look | None]:
    """What each picture looks like: what the ledger knows, and the others anew."""
    with Ledger(RunDir(root).kept, "looks") as ledger:
        tasks = [_Seen(item, _of_this_version(ledger.get(item.sha256))) for item in items]

        def keep(task: _Seen, look: dict[str, Any]) -> None:
            if look != task.before:
                ledger.put(task.item.sha256, look)

        looks = crew.map("looking for copies", partial(_look, root=root), tasks, name=_source, done=keep)
        return [_unpacked(look) for look in looks]


@dataclass(frozen=True)
class _Seen:
    item: Item
    before: dict[str, Any] | None  # what the ledger knows of its look


def _of_this_version(line: dict[str, Any] | None) -> dict[str, Any] | None:
    return line if line and line.get("version") == VERSION else None


def _source(task: _Seen) -> str:
    return task.item.source


def _unpacked(seen: Mapping[str, Any]) -> Look | None:
    if seen["hash"] is None:
        return None
    return np.uint64(int(seen["hash"], 16)), np.frombuffer(bytes.fromhex(seen["thumb"]), dtype=np.uint8)


def _look(task: _Seen, root: Path) -> dict[str, Any]:
    """The perceptual hash and the colours of a picture, in hex digits; nulls for one without structure."""
    if task.before:
        return task.before
    with Image.open(root / task.item.file) as picture:
        small = picture.convert("RGB").resize((64, 64), Image.Resampling.BOX)
    if float(np.asarray(small.convert("L")).std()) < _FLAT:
        return {"version": VERSION, "hash": None, "thumb": None}
    raised = np.packbits(imagehash.phash(small).hash.ravel()).tobytes()
    thumb = np.asarray(small.resize((_THUMB, _THUMB), Image.Resampling.BOX), dtype=np.uint8)
    return {"version": VERSION, "hash": raised.hex(), "thumb": thumb.tobytes().hex()}
