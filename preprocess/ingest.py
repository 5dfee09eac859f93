"""Stage 1: every usable picture of a folder or zip, decoded and copied into the run's own cache.

The source is only read. A file that is no picture, or a damaged one, is named with the reason and left out.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from PIL import Image

from preprocess.picture import decode, decode_mask
from preprocess.source import SourceFile, opened
from preprocess.types import Item, Limits, PictureError, PreprocessError, Skipped

VERSION = 1  # raise it when the same source would give other pixels or names

_log = logging.getLogger(__name__)
_TEXT = {".txt", ".caption"}
_FEWEST = 2


def ingest(
    source: str, out: Path, *, folder: str = "cache/pictures", masks: bool = False, limits: Limits | None = None
) -> tuple[list[Item], list[Skipped]]:
    """Writes out/folder/<name>.png (and <name>.mask.png) for each picture of `source`.

    Args:
        source: folder or .zip. x.txt beside x.png is its caption, x.mask.png its mask.
        out: where dataset.jsonl will be; items name their files relative to it.
        masks: read the masks. A picture whose mask is damaged is skipped, one without a mask is kept.

    Raises:
        PreprocessError: there is no such source, it is hostile, or fewer than two pictures can be used.
    """
    limits = limits or Limits()
    items: list[Item] = []
    skipped: list[Skipped] = []
    with opened(source, limits) as files:
        by_path = {file.path.lower(): file for file in files} | {file.path: file for file in files}
        pictures = [file for file in files if not _sidecar(file.path)]
        skipped += _orphans(files, pictures)
        for file, name in zip(pictures, _names(file.path for file in pictures), strict=True):
            try:
                items.append(_one(file, name, by_path, out, folder, masks=masks, limits=limits))
            except PictureError as error:
                _log.warning("%s is left out: %s", file.path, error)
                skipped.append(Skipped(file.path, str(error)))
    if len(items) < _FEWEST:
        raise PreprocessError(_too_few(source, items, skipped))
    if masks and not any(item.mask for item in items):
        raise PreprocessError(
            f"data.masks is on, but no picture of {source!r} has a mask: put x.mask.png beside x.png, or turn it off"
        )
    return items, skipped


def _sidecar(path: str) -> bool:
    """True for what belongs to a picture: its caption, its mask."""
    name = PurePosixPath(path)
    return name.suffix.lower() in _TEXT or name.stem.lower().endswith(".mask")


def _orphans(files: list[SourceFile], pictures: list[SourceFile]) -> list[Skipped]:
    """Captions and masks with no picture of their name beside them: most likely misspelt."""
    owners = {str(PurePosixPath(picture.path).with_suffix("")).lower() for picture in pictures}
    sidecars = [PurePosixPath(file.path) for file in files if _sidecar(file.path)]
    orphans = [path for path in sidecars if str(path.with_suffix("")).lower().removesuffix(".mask") not in owners]
    return [Skipped(str(path), "it belongs to no picture: none of its name is beside it") for path in orphans]


def _find(files: dict[str, SourceFile], picture: PurePosixPath, ending: str) -> SourceFile | None:
    path = str(picture.with_name(picture.stem + ending))
    return files.get(path) or files.get(path.lower())


def _one(
    file: SourceFile, name: str, files: dict[str, SourceFile], out: Path, folder: str, *, masks: bool, limits: Limits
) -> Item:
    image = decode(file.read(), limits)
    beside = PurePosixPath(file.path)
    mask = _find(files, beside, ".mask.png") if masks else None
    grey = decode_mask(mask.read(), limits, image.size) if mask else None
    caption = _find(files, beside, ".txt") or _find(files, beside, ".caption")
    text = _caption(caption, limits) if caption else ""
    where = f"{folder}/{name}.png"
    digest = _save(image, out / where)
    if grey is not None:
        _save(grey, out / folder / f"{name}.mask.png")
    return Item(
        name=name,
        file=where,
        sha256=digest,
        width=image.width,
        height=image.height,
        source=file.path,
        caption=text,
        mask=f"{folder}/{name}.mask.png" if grey is not None else None,
    )


def _caption(file: SourceFile, limits: Limits) -> str:
    try:
        content = file.read()
        if len(content) > limits.caption_bytes:
            raise PictureError(f"it has {len(content)} bytes, and {limits.caption_bytes} are allowed")
        return " ".join(content.decode("utf-8-sig").split())
    except (PictureError, UnicodeDecodeError) as error:
        raise PictureError(f"its caption {file.path} cannot be used: {error}") from error


def _save(image: Image.Image, path: Path) -> str:
    """Writes a PNG; gives its sha256."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def _names(paths: Iterable[str]) -> list[str]:
    """Short names that a person recognises: safe in a file name, unique even where case does not count."""
    taken: set[str] = set()
    names: list[str] = []
    for path in paths:
        stem = re.sub(r"[^\w-]+", "_", PurePosixPath(path).stem).strip("_")[:60] or "picture"
        name, n = stem, 2
        while name.lower() in taken:
            name, n = f"{stem}-{n}", n + 1
        taken.add(name.lower())
        names.append(name)
    return names


def _too_few(source: str, items: list[Item], skipped: list[Skipped]) -> str:
    have = "no picture" if not items else f"only one usable picture ({items[0].source})"
    reasons = "; ".join(f"{skip.file}: {skip.reason}" for skip in skipped[:5])
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    left_out = f" (left out: {reasons}{more})" if skipped else ""
    return f"{source!r} has {have}, and at least {_FEWEST} are needed{left_out}"
