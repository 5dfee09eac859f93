"""Upscalers: what makes a picture larger with detail that interpolation lacks. Importing this imports none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from PIL import Image

from trainer import registry
from trainer.args import UpscaleArgs

OFF = "off"
UPSCALERS = {"swin2sr": "preprocess.upscalers.swin2sr:Swin2SR"}

Enlarge = Callable[[Image.Image], Image.Image]  # RGB to RGB, both sides larger by the same factor


class Upscaler(Protocol):
    """Made with its options, which it checks without loading anything.

    Raises:
        PreprocessError: an option that it cannot use, or a model that is not there.
    """

    version: int  # raise it when the same picture would become another one

    def __init__(self, options: UpscaleArgs) -> None: ...
    def parameters(self) -> Mapping[str, Any]:
        """All that the result depends on besides the picture, as JSON: weights by their hash or revision."""
        ...

    def loaded(self) -> AbstractContextManager[Enlarge]:
        """The model, on its device while the context lasts; its memory is free after it."""
        ...


def kind(by: str, *, code: bool = True) -> type[Upscaler] | None:
    """The upscaler that data.upscale.by names; None for off.

    Args:
        code: False refuses module:attr and file.py:attr.

    Raises:
        PartError: there is none, or it is no upscaler.
    """
    if by == OFF:
        return None
    found: Any = registry.load({OFF: "", **UPSCALERS}, by, "data.upscale.by", code=code)
    lacking = [name for name in ("version", "parameters", "loaded") if not hasattr(found, name)]
    if lacking:
        raise registry.PartError(
            f"data.upscale.by {by!r} is no upscaler: it has no {', '.join(lacking)} (see docs/adding-a-part.md)"
        )
    return found
