"""Maskers: what finds, in a decoded picture, the part that counts. Importing this imports none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from PIL import Image

from trainer import registry
from trainer.args import MaskArgs

MASKERS = {
    "face": "preprocess.maskers.face:Face",
    "detect": "preprocess.maskers.detect:Detect",
    "person": "preprocess.maskers.person:Person",
    "foreground": "preprocess.maskers.foreground:Foreground",
    "text": "preprocess.maskers.text:Text",
}
FROM_SOURCE = ("sidecar", "folder", "alpha")  # files and transparency: the others look at the decoded picture

# One mask for each RGB picture, 8-bit grey of its size with white for what counts; None without a hit.
Find = Callable[[Sequence[Image.Image]], Sequence[Image.Image | None]]


class Masker(Protocol):
    """Made with its options, which it checks without loading anything.

    Raises:
        PreprocessError: an option that it cannot use, or a model that is not there.
    """

    version: int  # raise it when the same picture would get another mask

    def __init__(self, options: MaskArgs) -> None: ...
    def parameters(self) -> Mapping[str, Any]:
        """All that a mask depends on besides the picture, as JSON: weights by their hash or revision."""
        ...

    def loaded(self) -> AbstractContextManager[Find]:
        """What finds masks. A model is on its device while the context lasts, and its memory is free after it."""
        ...


def kind(source: str, *, code: bool = True) -> type[Masker] | None:
    """The masker that data.mask.sources calls `source`; None for what comes with the pictures.

    Args:
        code: False refuses module:attr and file.py:attr.

    Raises:
        PartError: there is none, or it is no masker.
    """
    if source in FROM_SOURCE:
        return None
    known = {**dict.fromkeys(FROM_SOURCE, ""), **MASKERS}
    found: Any = registry.load(known, source, "data.mask.sources", code=code)
    lacking = [name for name in ("version", "parameters", "loaded") if not hasattr(found, name)]
    if lacking:
        raise registry.PartError(
            f"data.mask.sources {source!r} is no masker: it has no {', '.join(lacking)} (see docs/adding-a-part.md)"
        )
    return found
