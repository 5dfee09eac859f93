"""The upscale stage: pictures that training would enlarge beyond data.upscale_limit are enlarged by a model instead.

    cache/upscaled/<name>.png (.key), <name>.mask.png

Its other pictures, and the user's, stay as they are. `Item.original` keeps the size that the picture really has.
"""

from __future__ import annotations

import inspect
import io
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from PIL import Image

from preprocess import buckets, upscalers
from preprocess.stagecache import StageKey, digest, kept
from preprocess.types import Item, PreprocessError
from trainer.args import DataArgs
from trainer.progress import Progress
from trainer.rundir import RunDir, atomic_write

VERSION = 1  # raise it when the same picture would become another one
_FOLDER = "upscaled"

_log = logging.getLogger(__name__)


def upscaled(
    items: Sequence[Item], root: Path, data: DataArgs, allowed: Sequence[Sequence[buckets.Size]]
) -> tuple[list[Item], list[str]]:
    """The items, those enlarged beyond the limit with a larger picture and mask; and a note about each of these.

    What was made is kept under the picture's content; the model is only loaded when something is missing.

    Args:
        root: folder that the items' files are relative to.
        allowed: buckets of each resolution, smallest first.

    Raises:
        PartError: data.upscale.by is unknown.
        PreprocessError: the model cannot be used.
    """
    kind = upscalers.kind(data.upscale.by)
    placed = [buckets.bucketed(item, *allowed) for item in items] if kind else []
    small = {item.name for item in placed if buckets.enlarged(item, item.bucket) > data.upscale_limit}
    if kind is None or not small:
        return list(items), []
    upscaler = kind(data.upscale)
    file = inspect.getsourcefile(kind) if ":" in data.upscale.by else None
    code = digest(Path(file).read_bytes()) if file else None
    key = StageKey(
        f"upscale {data.upscale.by}", upscaler.version, {"stage": VERSION, "code": code, **upscaler.parameters()}
    )
    with ExitStack() as stack, Progress(f"enlarging by {data.upscale.by}", len(small), "picture") as progress:
        enlarge: upscalers.Enlarge | None = None

        def loaded() -> upscalers.Enlarge:
            nonlocal enlarge
            if enlarge is None:
                _log.info("%s enlarges %d pictures", data.upscale.by, len(small))
                enlarge = stack.enter_context(upscaler.loaded())
            return enlarge

        made: list[Item] = []
        for item in items:
            if item.name not in small:
                made.append(item)
                continue
            made.append(_one(item, root, key, loaded))
            progress.advance()
    notes = [
        f"{item.source}: {data.upscale.by} made {item.width} x {item.height} pixels of its {own[0]} x {own[1]}"
        for item in made
        if (own := item.original)
    ]
    return made, notes


def _one(item: Item, root: Path, key: StageKey, loaded: Callable[[], upscalers.Enlarge]) -> Item:
    folder = RunDir(root).cache / _FOLDER
    path = folder / f"{item.name}.png"

    def make() -> bytes:
        with Image.open(root / item.file) as picture:
            small = picture.convert("RGB")
        large = loaded()(small)
        _check(item, large)
        return _png(large)

    sha256 = kept(path, key.of(item.sha256), make)
    with Image.open(path) as picture:
        size = picture.size
    mask = None
    if item.mask is not None:
        with Image.open(root / item.mask) as small:
            grey = small.convert("L").resize(size, Image.Resampling.BICUBIC)
        mask = folder / f"{item.name}.mask.png"
        atomic_write(mask, _png(grey), durable=False)
    return replace(
        item,
        file=path.relative_to(root).as_posix(),
        sha256=sha256,
        width=size[0],
        height=size[1],
        original=(item.width, item.height),
        mask=mask.relative_to(root).as_posix() if mask else None,
    )


def _check(item: Item, large: Image.Image) -> None:
    """Another shape would tear picture and mask, and crop and bucket, apart."""
    w, h = large.size
    if w <= item.width or w * item.height != h * item.width:
        raise PreprocessError(
            f"data.upscale.by made {w} x {h} pixels of the {item.width} x {item.height} of {item.source}; "
            "an upscaler must make both sides larger by the same factor"
        )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
