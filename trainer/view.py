"""What training sees of a picture: which box of it, in what colours, mirrored or not; and SDXL's numbers about that.

A picture has one plain version and, with `Augment`, some more. All of them are pure functions of their arguments.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from trainer.seed import derive

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture


class Picture(Protocol):
    """What a version depends on, of a picture."""

    @property
    def sha256(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def bucket(self) -> tuple[int, int]:
        """(width, height) in pixels that it is trained at."""
        ...

    @property
    def original(self) -> tuple[int, int] | None:
        """(width, height) before a model enlarged it; None where none did."""
        ...

    @property
    def centering(self) -> tuple[float, float]:
        """Share of what is cut off that goes left, at the top."""
        ...


@dataclass(frozen=True)
class Version:
    """One version of a picture."""

    box: Box  # this of the picture fills the bucket
    number: int = 0  # 0 is the plain one
    mirrored: bool = False  # left to right, after the crop
    colours: tuple[float, float, float] = (1.0, 1.0, 1.0)  # factors of brightness, contrast and saturation, in order


@dataclass(frozen=True)
class Augment:
    """The versions that a picture has."""

    variants: int = 0  # beside the plain one
    colour: float = 0.0  # most that a factor of `Version.colours` differs from 1
    crop: float = 0.0  # share of the plain box by which it is made smaller and moved, at most
    seed: int = 0

    def version(self, picture: Picture, number: int = 0, *, mirrored: bool = False) -> Version:
        """Version `number` of the picture: the same for the same seed, content and number.

        The box keeps the bucket's proportions and stays inside the picture.
        """
        box = cover(picture)
        if not number:
            return Version(box, 0, mirrored)
        draw = random.Random(derive(self.seed, "version", picture.sha256, number))
        smaller, right, down = self.crop * draw.random(), draw.uniform(-1, 1), draw.uniform(-1, 1)
        brightness, contrast, saturation = (1 + self.colour * draw.uniform(-1, 1) for _ in range(3))
        left, width = _moved(box[0], box[2], smaller, self.crop * right, picture.width)
        top, height = _moved(box[1], box[3], smaller, self.crop * down, picture.height)
        moved = (left, top, min(left + width, picture.width), min(top + height, picture.height))
        return Version(moved, number, mirrored, (brightness, contrast, saturation))

    def versions(self, picture: Picture, *, mirrored: bool = False) -> list[Version]:
        """All of them, plain first; `mirrored` too, each after its own."""
        sides = (False, True) if mirrored else (False,)
        return [self.version(picture, n, mirrored=side) for n in range(self.variants + 1) for side in sides]


PLAIN = Augment()


def _moved(start: float, end: float, smaller: float, by: float, whole: float) -> tuple[float, float]:
    """(start, length) of start..end shortened about its middle by the share `smaller`, moved by the share `by`."""
    length = (end - start) * (1 - smaller)
    middle = (start + end) / 2 + by * (end - start)
    return min(max(middle - length / 2, 0.0), whole - length), length


def cover(picture: Picture) -> Box:
    """The box that fills the bucket with nothing but what sticks out cut off; as `PIL.ImageOps.fit`, to the bit."""
    whole_width, whole_height = float(picture.width), float(picture.height)
    shape = picture.bucket[0] / picture.bucket[1]
    width, height = whole_width, whole_height
    if whole_width / whole_height > shape:
        width = shape * whole_height
    elif whole_width / whole_height < shape:
        height = whole_width / shape
    left = (whole_width - width) * picture.centering[0]
    top = (whole_height - height) * picture.centering[1]
    return left, top, left + width, top + height


def sizes(picture: Picture, version: Version) -> tuple[int, int, int, int, int, int]:
    """Original height and width, crop top and left, target height and width, in pixels: SDXL's time ids, in its order.

    The convention is that of Stability's paper (SDXL, arXiv 2307.01952, section 2.2) and of diffusers' SDXL training
    script: original is the picture as it is (as it was, where a model enlarged it), target the bucket. The crop's
    corner is counted in the picture after it was resized to cover the bucket, and flipped first where it is mirrored.
    (sd-scripts counts the corner in a picture that was resized to lie inside the bucket, so its numbers are other
    ones, zero or negative.) For a version that shows a smaller box the resized picture is larger accordingly.
    """
    left, top, right, bottom = version.box
    width, height = picture.bucket
    cut = picture.width - right if version.mirrored else left
    across, down = round(cut * width / (right - left)), round(top * height / (bottom - top))
    own_width, own_height = picture.original or (picture.width, picture.height)
    return own_height, own_width, max(0, down), max(0, across), height, width


def label(name: str, number: int = 0, *, mirrored: bool = False) -> str:
    """The name of a version of the picture `name`: dog, dog.mirrored, dog.v1, dog.v1.mirrored."""
    return f"{name}{f'.v{number}' if number else ''}{'.mirrored' if mirrored else ''}"
