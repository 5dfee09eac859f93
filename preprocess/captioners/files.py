"""Captioners that look at no picture: nothing at all, and the words of a file's name."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from preprocess.captioners import Write
from preprocess.types import Item
from trainer.args import CaptionModelArgs


class Nothing:
    """No caption for anything: what comes with a picture counts, or data.caption."""

    version = 1
    sees = False

    def __init__(self, options: CaptionModelArgs) -> None:
        """Takes no option."""

    def parameters(self) -> Mapping[str, Any]:
        return {}

    @contextmanager
    def loaded(self) -> Generator[Write]:
        yield _nothing


class Filename(Nothing):
    """red_dog-2 (1).png -> red dog."""

    @contextmanager
    def loaded(self) -> Generator[Write]:
        yield _filenames


def _nothing(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
    return [""] * len(items)


def _filenames(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
    return [words(item.source) for item in items]


def words(path: str) -> str:
    """The words of a file's name. What only tells copies apart is left out: (2), -003, IMG_1234."""
    stem = re.sub(r"[_\W]+", " ", PurePosixPath(path).stem)
    named = [word for word in stem.split() if not re.fullmatch(r"\d+|img|dsc|dscn|pxl|screenshot", word.lower())]
    return " ".join(named)
