"""The nouns of preprocessing: what a stage takes and gives, what stops it, what bounds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


class PreprocessError(ValueError):
    """The source cannot be trained on. One sentence for the person at the door."""


class PictureError(ValueError):
    """One picture (or its mask) cannot be used. The run goes on without it; the message is the reason."""


@dataclass(frozen=True)
class Limits:
    """What an archive or a picture may cost at most, so that a hostile one costs little."""

    entries: int = 10_000  # files in an archive or folder
    file_bytes: int = 256 * 2**20  # one file, uncompressed
    total_bytes: int = 4 * 2**30  # an archive, uncompressed
    ratio: int = 200  # uncompressed : compressed of one file; plain text and flat pictures stay below
    pixels: int = 80_000_000  # one picture, before it is decoded
    side: int = 16  # pixels; the shortest side worth training on
    caption_bytes: int = 20_000  # one caption file


@dataclass(frozen=True)
class Item:
    """One picture of the dataset: a line of dataset.jsonl."""

    name: str  # unique in the dataset, safe in a file name
    file: str  # the decoded picture, relative to the folder of dataset.jsonl
    sha256: str  # of that file
    width: int  # pixels, upright
    height: int
    source: str  # the file it came from, relative to the source
    caption: str = ""
    mask: str | None = None  # as `file`; white is what counts
    bucket: tuple[int, int] = (0, 0)  # width, height in pixels that training resizes it to

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
