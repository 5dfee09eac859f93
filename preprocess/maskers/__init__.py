"""Maskers: what finds, in a decoded picture, the part that counts. Importing this imports none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image

MASKERS = {
    "face": "preprocess.maskers.face:Face",
    "text": "preprocess.maskers.text:Text",
}


class Masker(Protocol):
    """Made with a `MaskArgs` when its stage runs; what it has loaded is freed with it."""

    def __call__(self, pictures: Sequence[Image.Image]) -> list[Image.Image | None]:
        """One mask for each RGB picture, 8-bit grey of its size with white for what counts; None without a hit."""
        ...
