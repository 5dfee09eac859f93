"""The caption stage: every item gets a caption, its own, a captioner's, or data.caption."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from preprocess.captioners import CAPTIONERS, Captioner, Write
from preprocess.captioners.fitting import Fitting
from preprocess.captionfiles import tidy
from preprocess.stagecache import StageKey, remembered_all
from preprocess.types import Item, PreprocessError
from trainer import registry
from trainer.args import CaptionModelArgs, DataArgs
from trainer.progress import Progress
from trainer.rundir import RunDir

VERSION = 2  # raise it when the same text would give another caption

_log = logging.getLogger(__name__)


def captioned(items: Sequence[Item], root: Path, data: DataArgs) -> list[Item]:
    """The items, each with a caption. What a captioner wrote is kept in the cache, under the picture's content.

    Args:
        root: folder that the items' files are relative to.

    Raises:
        PreprocessError: there is no such captioner, or its model cannot be used.
    """
    if data.captioner == "none" or data.recaption:
        items = [replace(item, caption="", captions=(), caption_from="") for item in items]
    bare = [item for item in items if not item.caption]
    captioner = _captioner(data)
    written = dict(zip((item.name for item in bare), _written(captioner, bare, root, data), strict=True))
    return [item if item.caption else _filled(item, written[item.name], data) for item in items]


def _captioner(data: DataArgs) -> Captioner:
    try:
        kind: Callable[[CaptionModelArgs], Captioner] = registry.load(CAPTIONERS, data.captioner, "data.captioner")
    except registry.PartError as error:
        raise PreprocessError(str(error)) from error
    return kind(data.caption_model)


def _filled(item: Item, text: str, data: DataArgs) -> Item:
    if caption := tidy(text):
        return replace(item, caption=caption, caption_from=data.captioner)
    if item.regular:
        return replace(item, caption=data.regularisation.caption or "", caption_from="data.regularisation.caption")
    return replace(item, caption=data.of(item.folder).own_caption, caption_from="data.caption")


def _written(captioner: Captioner, items: Sequence[Item], root: Path, data: DataArgs) -> list[str]:
    with ExitStack() as stack:
        if not captioner.sees:
            return list(stack.enter_context(captioner.loaded())(items, [])) if items else []
        folder = RunDir(root).cache / "captions"
        key = StageKey(f"caption {data.captioner}", captioner.version, captioner.parameters() if items else {})
        write: Write | None = None
        fitting = Fitting(data.caption_model.batch_size)

        def make(part: Sequence[Item]) -> Callable[[list[int]], Sequence[str]]:
            def missing(indices: list[int]) -> Sequence[str]:
                nonlocal write
                if write is None:
                    _log.info("%s looks at the pictures without a caption", data.captioner)
                    write = stack.enter_context(captioner.loaded())
                absent = [part[i] for i in indices]
                return fitting(len(absent), partial(_shown, write, absent, root, data.caption_model.side))

            return missing

        captions: list[str] = []
        progress = stack.enter_context(Progress("captioning", len(items), "picture"))
        for start in range(0, len(items), data.caption_model.batch_size):
            part = items[start : start + data.caption_model.batch_size]
            captions += remembered_all(folder, [(item.name, key.of(item.sha256)) for item in part], make(part))
            progress.advance(len(part))
        return captions


def _shown(write: Write, items: Sequence[Item], root: Path, side: int, part: slice) -> Sequence[str]:
    return write(items[part], [_small(root / item.file, side) for item in items[part]])


def _small(path: Path, side: int) -> Image.Image:
    """The picture with no side longer than `side` pixels."""
    with Image.open(path) as picture:
        image = picture.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image
