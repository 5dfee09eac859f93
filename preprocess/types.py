"""The nouns of preprocessing: what a stage takes and gives, what stops it, what bounds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from trainer.args import LimitsArgs

Limits = LimitsArgs  # what an archive, a picture or a download may cost at most


class PreprocessError(ValueError):
    """The source cannot be trained on. One sentence for the person at the door."""


class PictureError(ValueError):
    """One picture (or its mask) cannot be used. The run goes on without it; the message is the reason."""


def too_large(width: int, height: int, limits: Limits) -> str:
    """Why a picture of this size is refused before it is decoded."""
    return f"it is {width} x {height} pixels, and {limits.pixels} in all are allowed (data.limits.pixels)"


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: its relative path with forward slashes, and a way to its bytes."""

    path: str
    read: Callable[[], bytes]  # raises PictureError
    captions: tuple[str, ...] = ()  # that the source has for it in no file, each on one line
    captions_from: str = ""  # what a person calls the place
    anywhere: bool = False  # `read` can be sent to another process and works there


@dataclass(frozen=True)
class Item:
    """One picture of the dataset: a line of dataset.jsonl."""

    name: str  # unique in the dataset, safe in a file name
    file: str  # the decoded picture, relative to the folder of dataset.jsonl
    sha256: str  # of that file
    width: int  # pixels, upright
    height: int
    source: str  # the file it came from, relative to the source
    caption: str = ""  # the first, where it has several
    captions: tuple[str, ...] = ()  # all of them, where it has several
    caption_from: str = ""  # the file, "the picture itself", the captioner or data.caption that it came from
    mask: str | None = None  # as `file`; white is what counts
    original: tuple[int, int] | None = None  # width, height before a model enlarged it; None where none did
    bucket: tuple[int, int] = (0, 0)  # width, height in pixels that training resizes it to
    centering: tuple[float, float] = (0.5, 0.5)  # share of what the bucket cuts off that goes left, at the top
    trigger: str = ""  # of the concept that its folder holds
    regular: bool = False  # one of the regularisation set, which shows no concept

    @property
    def folder(self) -> str:
        """Of the file that it came from, relative to the source; . at the top."""
        return str(PurePosixPath(self.source).parent)

    def line(self, stages: dict[str, int]) -> dict[str, Any]:
        """The JSON object of this item; `stages` says which version of each stage made it."""
        return {**asdict(self), "stages": stages}


@dataclass(frozen=True)
class Skipped:
    """A file that is not in the dataset, with the reason why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What came of a source: the dataset, what was left out, and what a person may want to know."""

    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    untriggered: tuple[str, ...] = ()  # sources of the pictures whose captions named no trigger before it was put in
