"""Stage 1: every usable picture of a folder or zip, decoded and copied into the run's own cache.

The source is only read. A file that is no picture, or a damaged one, is named with the reason and left out.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from preprocess import embedded, masks
from preprocess.captionfiles import CaptionFiles, is_caption_file, is_table
from preprocess.picture import decode
from preprocess.source import SourceFile, opened, shown_all
from preprocess.stagecache import StageKey, digest, kept
from preprocess.types import Item, Limits, PictureError, PreprocessError, Skipped
from trainer.rundir import atomic_write
from trainer.share import ALONE, Share

VERSION = 2  # raise it when the same source would give other pixels or names

_log = logging.getLogger(__name__)
FEWEST = 2


def ingest(
    source: str,
    out: Path,
    *,
    folder: str = "cache/pictures",
    mask_sources: Sequence[str] = (),
    limits: Limits | None = None,
    private_urls: bool = False,
    caption_lines: bool = False,
    embedded_captions: bool = False,
    all_captioned: bool = False,
    share: Share = ALONE,
) -> tuple[list[Item], list[Skipped]]:
    """Writes out/folder/<name>.png (and <name>.mask.png) for each picture of `source`.

    Args:
        source: folder, picture, archive or URL, or several (`preprocess.source`). x.txt beside x.png is its
            caption, x.mask.png or masks/x.png its mask.
        out: where dataset.jsonl will be; items name their files relative to it.
        mask_sources: where masks are looked for (`masks.FROM_SOURCE`; others are left to a later stage). A picture
            whose mask is damaged is skipped, one without a mask is kept.
        private_urls: URLs may lead into private networks.
        caption_lines: each line of x.txt is a caption of its own.
        embedded_captions: a picture with no caption in a file may have one inside, in EXIF or PNG text.
        all_captioned: a table of captions must have all pictures beside it.
        share: of several processes on one `out`; each decodes its part and finds the others' in the cache.

    Raises:
        PreprocessError: there is no such source, it is hostile, or fewer than two pictures can be used.
    """
    limits = limits or Limits.model_validate({})
    items: list[Item] = []
    skipped: list[Skipped] = []
    with opened(source, limits, private_urls=private_urls, scratch=out) as files:
        by_path = {file.path.lower(): file for file in files} | {file.path: file for file in files}
        without_captions = [file for file in files if not _sidecar(file.path)]
        in_folders = masks.in_folders(without_captions, mask_sources)
        apart = {file.path for file in in_folders.values()}
        pictures = [file for file in without_captions if file.path not in apart]
        find_mask = masks.OfSource(mask_sources, in_folders, limits)
        inside = partial(embedded.caption, limits=limits) if embedded_captions else None
        captions = CaptionFiles(files, (file.path for file in pictures), limits, lines=caption_lines, inside=inside)
        skipped += _orphans(files, pictures, apart)
        named = list(zip(pictures, _names(file.path for file in pictures), strict=True))
        one = partial(_one, files=by_path, out=out, folder=folder, mask=find_mask, captions=captions, limits=limits)
        if share.processes > 1:
            for file, name in share.of(named):
                with suppress(PictureError):  # said below, in the order of the whole
                    one(file, name)
            share.barrier()
        for file, name in named:
            try:
                items.append(one(file, name))
            except PictureError as error:
                _log.warning("%s is left out: %s", file.path, error)
                skipped.append(Skipped(file.path, str(error)))
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


def _find(files: dict[str, SourceFile], picture: PurePosixPath, ending: str) -> SourceFile | None:
    path = str(picture.with_name(picture.stem + ending))
    return files.get(path) or files.get(path.lower())


def _one(
    file: SourceFile,
    name: str,
    files: dict[str, SourceFile],
    out: Path,
    folder: str,
    *,
    mask: masks.OfSource,
    captions: CaptionFiles,
    limits: Limits,
) -> Item:
    content = file.read()
    where = f"{folder}/{name}.png"
    key = StageKey("ingest", VERSION, limits.model_dump(include={"pixels", "side"})).of(digest(content))
    sha256, _ = kept(out / where, key, lambda: _png(decode(content, limits)))
    with Image.open(out / where) as image:
        size = image.size
    beside = PurePosixPath(file.path)
    grey = mask(file.path, content, size, _find(files, beside, ".mask.png"))
    own = captions.of(file.path, content)
    if grey is not None:
        atomic_write(out / folder / f"{name}.mask.png", _png(grey))
    return Item(
        name=name,
        file=where,
        sha256=sha256,
        width=size[0],
        height=size[1],
        source=file.path,
        caption=own.captions[0] if own.captions else "",
        captions=own.captions if len(own.captions) > 1 else (),
        caption_from=own.source,
        mask=f"{folder}/{name}.mask.png" if grey is not None else None,
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


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
    return f"{shown_all(source)!r} has {have}, and at least {FEWEST} are needed{left_out}"
