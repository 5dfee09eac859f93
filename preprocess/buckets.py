"""Stage 3: every item gets the size that it is trained at: nearly its own shape, at a common area.

Sides are multiples of `step`, the area is at most resolution x resolution, and no bucket is more than twice as
long as it is wide.
"""

from __future__ import annotations

import math
from dataclasses import replace

from preprocess.types import Item, PreprocessError

VERSION = 1  # raise it when the same size would give another bucket

_LONGEST = 2.0  # longer side : shorter side
_CUT_NOTED = 0.25  # share of a picture; more than this cut off by its bucket is worth telling


def sizes(resolution: int, step: int) -> list[tuple[int, int]]:
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


def bucketed(item: Item, buckets: list[tuple[int, int]]) -> Item:
    """The item with the bucket whose proportions are nearest its own; of equals the larger one."""
    shape = math.log(item.width / item.height)

    def distance(bucket: tuple[int, int]) -> tuple[float, int]:
        w, h = bucket
        return abs(math.log(w / h) - shape), -w * h

    return replace(item, bucket=min(buckets, key=distance))


def remark(item: Item) -> str | None:
    """What a person should know about the bucket of this picture, or None."""
    w, h = item.bucket
    scale = max(w / item.width, h / item.height)
    lost = 1 - (w * h) / (item.width * item.height * scale * scale)
    if lost > _CUT_NOTED:
        return f"{item.source}: {lost:.0%} of it is cut off to fit {w} x {h}"
    if scale > 2:
        return f"{item.source}: its {item.width} x {item.height} pixels are enlarged {scale:.1f} times"
    return None
