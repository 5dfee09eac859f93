"""The last stage: every item gets the size that it is trained at, nearly its own shape at a common area, and its crop.

Sides are multiples of `step`, the area is at most resolution x resolution, and no bucket is more than twice as
long as it is wide. With several resolutions a picture gets the largest that it fills without being enlarged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from preprocess.crew import Crew
from preprocess.types import Item, PreprocessError

VERSION = 1  # raise it when the same size would give another bucket

_LONGEST = 2.0  # longer side : shorter side
_CUT_NOTED = 0.25  # share of a picture; more than this cut off by its bucket is worth telling

Size = tuple[int, int]


def sizes(resolution: int, step: int) -> list[Size]:
    """All buckets (width, height) in pixels, narrowest first: for each short side the longest that keeps the area.

    Raises:
        PreprocessError: the resolution is less than one step.
    """
    if resolution < step:
        raise PreprocessError(
            f"data.resolution is {resolution}, and this base needs at least {step} (in steps of {step})"
        )
    square = resolution // step * step
    shapes = ((short, square * square // short // step * step) for short in range(step, square + step, step))
    upright = [(short, long) for short, long in shapes if long <= _LONGEST * short]
    return sorted({*upright, *((long, short) for short, long in upright)})


def bucketed(item: Item, *choices: Sequence[Size]) -> Item:
    """The item with its bucket.

    Args:
        choices: the buckets of each resolution, smallest resolution first. In each the bucket counts whose
            proportions are nearest the item's own, of equals the larger one.

    What a model enlarged is placed by its original size: detail that was made up calls for no larger bucket.
    """
    own = replace(item, width=item.original[0], height=item.original[1]) if item.original else item
    nearest = [_nearest(own, buckets) for buckets in choices]
    filled = [bucket for bucket in nearest if enlarged(own, bucket) <= 1]
    return replace(item, bucket=filled[-1] if filled else nearest[0])


def _nearest(item: Item, buckets: Sequence[Size]) -> Size:
    shape = math.log(item.width / item.height)

    def distance(bucket: Size) -> tuple[float, int]:
        w, h = bucket
        return abs(math.log(w / h) - shape), -w * h

    return min(buckets, key=distance)


def enlarged(item: Item, bucket: Size) -> float:
    """How many times the picture's sides grow until it covers the bucket; below 1 they shrink."""
    return max(bucket[0] / item.width, bucket[1] / item.height)


def cropped(item: Item) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in pixels of the picture, of what training sees of it."""
    scale = enlarged(item, item.bucket)
    w, h = item.bucket[0] / scale, item.bucket[1] / scale
    x, y = item.centering
    left, top = (item.width - w) * x, (item.height - h) * y
    return left, top, left + w, top + h


def focused(items: Sequence[Item], root: Path, crew: Crew | None = None) -> tuple[Item, ...]:
    """The items with their crops moved, as far as the pictures reach, to have the masks' centroids in their middle.

    Without a mask, or with a black one, the crop stays where it is.

    Args:
        root: folder that the items' files are relative to.
        crew: looks at the masks [default: this process].
    """
    crew = crew or Crew(workers=0)
    masked = [item for item in items if item.mask is not None]
    middles = crew.map("finding masks' middles", partial(_middle, root=root), masked, name=_source)
    by_name = dict(zip((item.name for item in masked), middles, strict=True))
    return tuple(_moved(item, by_name.get(item.name)) for item in items)


def _source(item: Item) -> str:
    return item.source


def _middle(item: Item, root: Path) -> tuple[float, float] | None:
    """x, y in pixels of the mask's centroid; None of a black one."""
    assert item.mask is not None
    with Image.open(root / item.mask) as mask:
        weight = np.asarray(mask.convert("L"), dtype=np.float64)
    total = weight.sum()
    if not total:
        return None
    x = float((weight.sum(axis=0) @ (np.arange(item.width) + 0.5)) / total)
    y = float((weight.sum(axis=1) @ (np.arange(item.height) + 0.5)) / total)
    return x, y


def _moved(item: Item, middle: tuple[float, float] | None) -> Item:
    if middle is None:
        return item
    scale = enlarged(item, item.bucket)
    x, y = (
        _centering(at, whole, part / scale)
        for at, whole, part in zip(middle, (item.width, item.height), item.bucket, strict=True)
    )
    return replace(item, centering=(x, y))


def _centering(middle: float, whole: float, part: float) -> float:
    """Share of whole - part to leave before the part, so that its middle lies nearest to `middle`; 4 digits."""
    spare = whole - part
    if spare < 1:  # pixel: nothing to choose
        return 0.5
    return round(min(max((middle - part / 2) / spare, 0.0), 1.0), 4)


def remarks(item: Item, upscale_limit: float) -> list[str]:
    """What a person should know about the bucket of this picture: much of it is cut off, it is enlarged much."""
    w, h = item.bucket
    scale = enlarged(item, item.bucket)
    lost = 1 - (w * h) / (item.width * item.height * scale * scale)
    notes: list[str] = []
    if lost > _CUT_NOTED:
        notes.append(f"{item.source}: {lost:.0%} of it is cut off to fit {w} x {h}")
    if scale > upscale_limit:
        notes.append(
            f"{item.source}: its {item.width} x {item.height} pixels are enlarged {scale:.1f} times to fit {w} x {h}, "
            f"and data.upscale_limit is {upscale_limit:g}: it will look soft"
        )
    return notes
