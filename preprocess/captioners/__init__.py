"""What writes captions for pictures that come without one: name -> where the class is. Importing this loads no model.

`sidecar` and `none` are no classes: they write nothing, and data.caption stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from PIL import Image

from preprocess.types import Item
from trainer.args import CaptionModelArgs

CAPTIONERS: dict[str, str] = {
    "sidecar": "preprocess.captioners.files:Nothing",
    "none": "preprocess.captioners.files:Nothing",
    "filename": "preprocess.captioners.files:Filename",
    "clip": "preprocess.captioners.clip:Clip",
    "blip": "preprocess.captioners.generated:Blip",
    "florence2": "preprocess.captioners.generated:Florence2",
    "qwen-vl": "preprocess.captioners.chat:QwenVL",
    "joycaption": "preprocess.captioners.chat:JoyCaption",
    "wd-tagger": "preprocess.captioners.tagger:WdTagger",
}

Write = Callable[[Sequence[Item], Sequence[Image.Image]], Sequence[str]]  # one caption for each item


class Captioner(Protocol):
    """Made with its options, which it checks without loading anything.

    Raises:
        PreprocessError: an option that it cannot use, or a model that is not there.
    """

    version: int  # raise it when the same picture would get another caption
    sees: bool  # looks at the pictures; else it gets none, and nothing is kept of what it wrote

    def __init__(self, options: CaptionModelArgs) -> None: ...
    def parameters(self) -> Mapping[str, Any]:
        """All that a caption depends on besides the picture, as JSON: weights by their hash or revision."""
        ...

    def loaded(self) -> AbstractContextManager[Write]:
        """The model, on its device while the context lasts."""
        ...
