"""Where the masks of pictures come from: files of the source, transparency, or a masker that looks at the picture."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image, ImageChops, ImageFilter

from preprocess import maskers
from preprocess.crew import Crew
from preprocess.picture import decode_alpha, decode_mask
from preprocess.stagecache import StageKey, digest, kept
from preprocess.types import Item, Limits, PreprocessError, SourceFile
from trainer.args import MaskArgs
from trainer.progress import Progress
from trainer.rundir import RunDir, atomic_write

VERSION = 2  # raise it when the same picture would get another mask

_FOLDER = "masks"
_TO_DO = {  # what a person can do about a source that had no mask at all
    "sidecar": "put x.mask.png beside x.png, ",
    "folder": "put x.png into a folder masks, ",
    "alpha": "give pictures with a transparent background, ",
}


def owner(path: str) -> str | None:
    """The picture, without suffix and in lower case, that a file in a folder `masks` belongs to; else None.

    `masks/a/x.png` and `a/masks/x.png` both belong to `a/x`.
    """
    parts = [part.lower() for part in PurePosixPath(path).with_suffix("").parts]
    if _FOLDER not in parts[:-1]:
        return None
    last = len(parts) - 2 - parts[-2::-1].index(_FOLDER)
    return "/".join(parts[:last] + parts[last + 1 :])


def in_folders(files: Iterable[SourceFile], sources: Sequence[str]) -> dict[str, SourceFile]:
    """Picture as `owner` names it -> its mask in a folder `masks`.

    A file there that belongs to no picture is a mask only when such folders are among `sources`: else it may as
    well be a picture.
    """
    outside: set[str] = set()
    inside: dict[str, SourceFile] = {}
    for file in files:
        of = owner(file.path)
        if of is None:
            outside.add(str(PurePosixPath(file.path).with_suffix("")).lower())
        else:
            inside.setdefault(of, file)
    return {of: file for of, file in inside.items() if of in outside or "folder" in sources}


@dataclass(frozen=True)
class OfSource:
    """Finds the mask that a picture of the source brings along."""

    sources: Sequence[str]  # the first of them that has one counts
    in_folders: Mapping[str, SourceFile]  # of that function
    limits: Limits

    def only(self, path: str) -> OfSource:
        """The same for one picture of the source alone: small enough to be sent to another process."""
        stem = _stem(path)
        return replace(self, in_folders={stem: self.in_folders[stem]} if stem in self.in_folders else {})

    def __call__(
        self, path: str, content: bytes, size: tuple[int, int], sidecar: SourceFile | None
    ) -> Image.Image | None:
        """8-bit grey of `size`; None when there is no mask.

        Args:
            path: the picture's, in the source.
            content: its file.
            sidecar: x.mask.png beside it.

        Raises:
            PictureError: a mask is there and cannot be used.
        """
        inside = self.in_folders.get(_stem(path))
        files = {"sidecar": sidecar, "folder": inside}
        for source in self.sources:
            file = files.get(source)
            mask = decode_mask(file.read(), self.limits, size) if file else None
            if source == "alpha":
                mask = decode_alpha(content, self.limits)
            if mask is not None:
                return mask
        return None


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix("")).lower()


def masked(
    items: Sequence[Item], root: Path, options: MaskArgs, crew: Crew | None = None
) -> tuple[list[Item], list[str]]:
    """The items, with masks by the maskers of `options.sources` where none was found yet, inverted and feathered.

    Each source is shown the pictures that those before it found nothing in. A picture without a hit stays unmasked
    and is named in the notes, which come second.

    Args:
        root: folder that the items' files are relative to.
        crew: reads and finishes masks [default: this process]; of several ranks the first alone runs the maskers.

    Raises:
        PartError: a masker is unknown.
        PreprocessError: a masker cannot run here, or no picture has a mask in the end.
    """
    crew = crew or Crew(workers=0)
    found = {item.name: item for item in items}
    for source in options.sources:
        kind = maskers.kind(source)
        missing = [item for item in found.values() if item.mask is None]
        if kind and missing:
            found |= {item.name: item for item in _by(source, kind, missing, root, options, crew)}
    bare = [item for item in found.values() if item.mask is None]
    by = ", ".join(options.sources)
    if len(bare) == len(items):
        by_hand = "".join(_TO_DO.get(source, "") for source in options.sources)
        raise PreprocessError(
            f"data.masks is on, but no picture of data.source has a mask by {by}: {by_hand}name others in "
            "data.mask.sources, or turn it off (--no-data.masks)"
        )
    notes = [f"{item.source}: no mask was found by {by}, so the whole picture counts" for item in bare]
    return _finished(list(found.values()), root, options, crew), notes


def _by(
    source: str, kind: type[maskers.Masker], items: Sequence[Item], root: Path, options: MaskArgs, crew: Crew
) -> list[Item]:
    """The items that the masker finds something in, with their masks written beside them.

    What it made is kept in the cache under the picture's content; it is only loaded when something is missing.
    """
    masker = kind(options)
    parameters = {"stage": VERSION, "code": _code(source, kind), **masker.parameters()}
    key = StageKey(f"mask {source}", masker.version, parameters)
    with crew.share.first_alone():
        missing = [item for item in items if not _kept(root, item, key).exists()]
        if missing:
            with masker.loaded() as find, Progress(f"masking by {source}", len(missing), "picture") as progress:
                for start in range(0, len(missing), options.batch_size):
                    group = missing[start : start + options.batch_size]
                    pictures = [_opened(root / item.file, "RGB") for item in group]
                    for item, picture, mask in zip(group, pictures, find(pictures), strict=True):
                        atomic_write(_kept(root, item, key), _png(_fitting(source, mask, picture)))
                    progress.advance(len(group))
    where = crew.map("reading masks", partial(_hit, root=root, key=key), items, name=_source)
    return [replace(item, mask=mask) for item, mask in zip(items, where, strict=True) if mask]


def _source(item: Item) -> str:
    return item.source


def _hit(item: Item, root: Path, key: StageKey) -> str | None:
    """The mask beside the picture, which is that of the cache; None when that is black, which stands for no hit."""
    kept_at = _kept(root, item, key)
    if not _opened(kept_at, "L").getbbox():
        return None
    where = str(PurePosixPath(item.file).with_suffix(".mask.png"))
    atomic_write(root / where, kept_at.read_bytes(), durable=False)
    return where


def _code(source: str, kind: type[maskers.Masker]) -> str | None:
    """sha256 of the file that a masker of the user's own is in, which may change under its name."""
    if ":" not in source:
        return None
    file = inspect.getsourcefile(kind)
    return digest(Path(file).read_bytes()) if file else None


def _fitting(source: str, mask: Image.Image | None, picture: Image.Image) -> Image.Image:
    if mask is None:
        return Image.new("L", picture.size)
    if mask.size != picture.size:
        raise PreprocessError(
            f"the masker {source} made a mask of {mask.width} x {mask.height} pixels for a picture of "
            f"{picture.width} x {picture.height}; they must be of one size"
        )
    return mask.convert("L")


def _kept(root: Path, item: Item, key: StageKey) -> Path:
    return RunDir(root).cache / "masks" / f"{item.name}.{key.of(item.sha256)[:16]}.png"


def _finished(items: list[Item], root: Path, options: MaskArgs, crew: Crew) -> list[Item]:
    """The items with their masks inverted and feathered, where that is asked for. Those that were found stay."""
    if not (options.feather or options.invert):
        return items
    have = [item for item in items if item.mask is not None]
    one = partial(_one_finished, root=root, feather=options.feather, invert=options.invert)
    where = dict(zip((item.name for item in have), crew.map("finishing masks", one, have, name=_source), strict=True))
    return [replace(item, mask=where.get(item.name)) for item in items]


def _one_finished(item: Item, root: Path, feather: float, invert: bool) -> str:
    """A feathered edge fades over about `feather` of the picture's shorter side."""
    assert item.mask is not None
    content = (root / item.mask).read_bytes()

    def make() -> bytes:
        with Image.open(io.BytesIO(content)) as found:
            mask = found.convert("L")
        if invert:
            mask = ImageChops.invert(mask)
        if feather:
            radius = feather * min(mask.size) / 2  # a gaussian falls from 84 % to 16 % within twice its deviation
            mask = mask.filter(ImageFilter.GaussianBlur(radius))
        return _png(mask)

    where = str(PurePosixPath(item.file).with_suffix(".soft.mask.png" if feather else ".inverse.mask.png"))
    key = StageKey("finished mask", VERSION, {"feather": feather, "invert": invert})
    kept(root / where, key.of(digest(content)), make)
    return where


def _opened(path: Path, mode: str) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert(mode)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
