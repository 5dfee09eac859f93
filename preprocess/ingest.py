"""Stage 1: every usable picture of a folder or zip, decoded and copied into the run's own cache.

The source is only read. A file that is no picture, or a damaged one, is named with the reason and left out.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from preprocess import embedded, masks
from preprocess.captionfiles import CaptionFiles, Near, is_caption_file, is_table
from preprocess.crew import Crew
from preprocess.picture import decode
from preprocess.source import SourceFile, in_memory, opened, shown_all
from preprocess.stagecache import Ledger, StageKey, digest
from preprocess.types import Item, Limits, PictureError, PreprocessError, Skipped
from trainer.args import HubArgs
from trainer.rundir import RunDir, atomic_write

VERSION = 2  # raise it when the same source would give other pixels or names

_log = logging.getLogger(__name__)
FEWEST = 2


def ingest(
    source: str,
    out: Path,
    *,
    folder: str = "cache/pictures",
    prefix: str = "",
    mask_sources: Sequence[str] = (),
    limits: Limits | None = None,
    private_urls: bool = False,
    hub: HubArgs | None = None,
    caption_lines: bool = False,
    embedded_captions: bool = False,
    all_captioned: bool = False,
    crew: Crew | None = None,
) -> tuple[list[Item], list[Skipped]]:
    """Writes out/folder/<name>.png (and <name>.mask.png) for each picture of `source`.

    Args:
        source: folder, picture, archive or URL, or several (`preprocess.source`). x.txt beside x.png is its
            caption, x.mask.png or masks/x.png its mask.
        out: where dataset.jsonl will be; items name their files relative to it.
        prefix: what the names of the pictures begin with, so that those of two sources differ.
        mask_sources: where masks are looked for (`maskers.FROM_SOURCE`; others are left to a later stage). A picture
            whose mask is damaged is skipped, one without a mask is kept.
        private_urls: URLs may lead into private networks.
        hub: which part of a data set on the hub is read.
        caption_lines: each line of x.txt is a caption of its own.
        embedded_captions: a picture with no caption in a file may have one inside, in EXIF or PNG text.
        all_captioned: a table of captions must have all pictures beside it.
        crew: does the work [default: this process].

    Raises:
        PreprocessError: there is no such source, it is hostile, or fewer than two pictures can be used.
    """
    limits = limits or Limits.model_validate({})
    crew = crew or Crew(workers=0)
    with (
        opened(source, limits, private_urls=private_urls, scratch=out, hub=hub) as files,
        Ledger(RunDir(out).kept, "ingest") as ledger,
    ):
        without_captions = [file for file in files if not _sidecar(file.path)]
        in_folders = masks.in_folders(without_captions, mask_sources)
        apart = {file.path for file in in_folders.values()}
        pictures = [file for file in without_captions if file.path not in apart]
        inside = partial(embedded.caption, limits=limits) if embedded_captions else None
        captions = CaptionFiles(files, (file.path for file in pictures), limits, lines=caption_lines, inside=inside)
        find_mask = masks.OfSource(mask_sources, in_folders, limits)
        beside = _lookup(files) if "sidecar" in mask_sources else {}
        tasks: list[_Task] = []
        for file, stem in zip(pictures, _names(file.path for file in pictures), strict=True):
            name = f"{prefix}{stem}"
            where = f"{folder}/{name}"
            mask = _OfMask(find_mask.only(file.path), _find(beside, file.path, ".mask.png")) if mask_sources else None
            tasks.append(_Task(name, where, file, captions.near(file.path), mask, ledger.get(where)))

        def keep(task: _Task, made: dict[str, Any]) -> None:
            if "new" in made:
                ledger.put(task.where, made["new"])

        one = partial(_one, out=out, limits=limits)
        made = crew.map("decoding", one, tasks, name=_path, pack=_packed, done=keep)
    items: list[Item] = []
    skipped = _orphans(files, pictures, apart)
    for task, came in zip(tasks, made, strict=True):
        if "why" in came:
            _log.warning("%s is left out: %s", task.file.path, came["why"])
            skipped.append(Skipped(task.file.path, came["why"]))
        else:
            items.append(_item(task, came))
    if len(items) < FEWEST:
        raise PreprocessError(_too_few(source, items, skipped))
    if all_captioned:
        captions.check(items)
    return items, skipped


def _sidecar(path: str) -> bool:
    """True for what belongs to a picture: its caption, its mask."""
    name = PurePosixPath(path)
    return is_caption_file(path) or name.stem.lower().endswith(".mask")


def _orphans(files: list[SourceFile], pictures: list[SourceFile], in_folders: set[str]) -> list[Skipped]:
    """Captions and masks with no picture of their name beside them: most likely misspelt."""
    owners = {str(PurePosixPath(picture.path).with_suffix("")).lower() for picture in pictures}
    sidecars = [file.path for file in files if _sidecar(file.path) or file.path in in_folders]
    sidecars = [path for path in sidecars if not is_table(path)]
    orphans = [path for path in sidecars if _owner(path, in_folders) not in owners]
    return [Skipped(path, "it belongs to no picture: none of its name is beside it") for path in orphans]


def _owner(path: str, in_folders: set[str]) -> str | None:
    if path in in_folders:
        return masks.owner(path)
    return str(PurePosixPath(path).with_suffix("")).lower().removesuffix(".mask")


def _lookup(files: list[SourceFile]) -> dict[str, SourceFile]:
    return {file.path.lower(): file for file in files} | {file.path: file for file in files}


def _find(files: dict[str, SourceFile], picture: str, ending: str) -> SourceFile | None:
    path = picture.removesuffix(PurePosixPath(picture).suffix) + ending
    return files.get(path) or files.get(path.lower())


@dataclass(frozen=True)
class _OfMask:
    find: masks.OfSource
    sidecar: SourceFile | None


@dataclass(frozen=True)
class _Task:
    """All that making one item needs, and nothing that cannot go to another process once it is packed."""

    name: str
    where: str  # its file in `out`, without suffix
    file: SourceFile
    captions: Near
    mask: _OfMask | None
    before: dict[str, Any] | None  # what the ledger knows of it


def _path(task: _Task) -> str:
    return task.file.path


def _packed(task: _Task) -> tuple[_Task, int]:
    """The task with the files in memory that only this process can read, and their bytes."""
    sizes: list[int] = []

    def pack(file: SourceFile) -> SourceFile:
        packed, size = in_memory(file)
        sizes.append(size)
        return packed

    mask = task.mask
    if mask:
        inside = {path: pack(file) for path, file in mask.find.in_folders.items()}
        mask = _OfMask(replace(mask.find, in_folders=inside), pack(mask.sidecar) if mask.sidecar else None)
    captions = replace(task.captions, sidecars=tuple(pack(file) for file in task.captions.sidecars))
    return replace(task, file=pack(task.file), captions=captions, mask=mask), sum(sizes)


def _one(task: _Task, *, out: Path, limits: Limits) -> dict[str, Any]:
    """What came of a picture, as JSON: its item's fields and what is `new` for the ledger; or `why` it is left out."""
    try:
        content = task.file.read()
        made = _decoded(task, content, out, limits)
        size = made["width"], made["height"]
        mask = task.mask and task.mask.find(task.file.path, content, size, task.mask.sidecar)
        own = task.captions.read(content)
    except PictureError as error:
        return {"why": str(error)}
    if mask is not None:
        atomic_write(out / f"{task.where}.mask.png", _png(mask))
    found = {"made": made, "captions": own.captions, "caption_from": own.source, "masked": mask is not None}
    return found if made is task.before else found | {"new": made}


def _decoded(task: _Task, content: bytes, out: Path, limits: Limits) -> dict[str, Any]:
    """The line of the ledger about the decoded picture, which is there already or is made."""
    path = Path(f"{out}/{task.where}.png")
    key = StageKey("ingest", VERSION, limits.model_dump(include={"pixels", "side"})).of(digest(content))
    before = task.before
    if before and before.get("key") == key and before.get("sha256") == _digest_of(path):
        return before
    picture = decode(content, limits)
    png = _png(picture)
    atomic_write(path, png, durable=False)
    return {"key": key, "sha256": digest(png), "width": picture.width, "height": picture.height}


def _digest_of(path: Path) -> str | None:
    try:
        return digest(path.read_bytes())
    except FileNotFoundError:
        return None


def _item(task: _Task, came: dict[str, Any]) -> Item:
    captions = tuple(came["captions"])
    return Item(
        name=task.name,
        file=f"{task.where}.png",
        sha256=came["made"]["sha256"],
        width=came["made"]["width"],
        height=came["made"]["height"],
        source=task.file.path,
        caption=captions[0] if captions else "",
        captions=captions if len(captions) > 1 else (),
        caption_from=came["caption_from"],
        mask=f"{task.where}.mask.png" if came["masked"] else None,
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _names(paths: Iterable[str]) -> list[str]:
    """Short names that a person recognises: safe in a file name, unique even where case does not count."""
    taken: dict[str, int] = {}  # name -> the number to try next where it is taken
    names: list[str] = []
    for path in paths:
        stem = re.sub(r"[^\w-]+", "_", PurePosixPath(path).stem).strip("_")[:60] or "picture"
        name, n = stem, taken.get(stem.lower(), 2)
        while name.lower() in taken:
            name, n = f"{stem}-{n}", n + 1
        taken[stem.lower()] = n
        taken[name.lower()] = 2
        names.append(name)
    return names


def _too_few(source: str, items: list[Item], skipped: list[Skipped]) -> str:
    have = "no picture" if not items else f"only one usable picture ({items[0].source})"
    reasons = "; ".join(f"{skip.file}: {skip.reason}" for skip in skipped[:5])
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    left_out = f" (left out: {reasons}{more})" if skipped else "" if items else " (no file was found in it)"
    return f"{shown_all(source)!r} has {have}, and at least {FEWEST} are needed{left_out}"
