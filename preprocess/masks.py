"""Where the masks of pictures come from: files of the source, transparency, or a masker that looks at the picture."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from PIL import Image, ImageChops, ImageFilter

from preprocess import maskers
from preprocess.picture import decode_alpha, decode_mask
from preprocess.stagecache import StageKey, digest
from preprocess.types import Item, Limits, PreprocessError, SourceFile
from trainer.args import MaskArgs
from trainer.progress import Progress
from trainer.rundir import RunDir, atomic_write

VERSION = 2  # raise it when the same picture would get another mask

_FOLDER = "masks"


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


def masked(items: Sequence[Item], root: Path, options: MaskArgs) -> tuple[list[Item], list[str]]:
    """The items, with masks by the maskers of `options.sources` where none was found yet, inverted and feathered.

    Each source is shown the pictures that those before it found nothing in. A picture without a hit stays unmasked
    and is named in the notes, which come second.

    Args:
        root: folder that the items' files are relative to.

    Raises:
        PartError: a masker is unknown.
        PreprocessError: a masker cannot run here, or no picture has a mask in the end.
    """
    found = {item.name: item for item in items}
    for source in options.sources:
        kind = maskers.kind(source)
        missing = [item for item in found.values() if item.mask is None]
        if kind and missing:
            found |= {item.name: item for item in _by(source, kind, missing, root, options)}
    bare = [item for item in found.values() if item.mask is None]
    if len(bare) == len(items):
        raise PreprocessError(
            f"data.masks is on, but no picture of data.source has a mask by {', '.join(options.sources)}: put "
            "x.mask.png beside x.png or x.png into a folder masks, name others in data.mask.sources, or turn it off"
        )
    by = ", ".join(options.sources)
    notes = [f"{item.source}: no mask was found by {by}, so the whole picture counts" for item in bare]
    return [_finished(item, root, options) for item in found.values()], notes


def _by(
    source: str, kind: type[maskers.Masker], items: Sequence[Item], root: Path, options: MaskArgs
) -> Iterable[Item]:
    """The items that the masker finds something in, with their masks written beside them.

    What it made is kept in the cache under the picture's content; it is only loaded when something is missing.
    """
    masker = kind(options)
    parameters = {"stage": VERSION, "code": _code(source, kind), **masker.parameters()}
    key = StageKey(f"mask {source}", masker.version, parameters)
    kept = {item.name: _kept(root, item, key) for item in items}
    missing = [item for item in items if not kept[item.name].exists()]
    if missing:
        with masker.loaded() as find, Progress(f"masking by {source}", len(missing), "picture") as progress:
            for start in range(0, len(missing), options.batch_size):
                group = missing[start : start + options.batch_size]
                pictures = [_opened(root / item.file, "RGB") for item in group]
                for item, picture, mask in zip(group, pictures, find(pictures), strict=True):
                    atomic_write(kept[item.name], _png(_fitting(source, mask, picture)))
                progress.advance(len(group))
    for item in items:
        mask = _opened(kept[item.name], "L")
        if mask.getbbox():  # a black one stands for no hit
            where = str(PurePosixPath(item.file).with_suffix(".mask.png"))
            atomic_write(root / where, _png(mask))
            yield replace(item, mask=where)


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


def _finished(item: Item, root: Path, options: MaskArgs) -> Item:
    """The item with its mask inverted and feathered, where that is asked for. The one that was found stays.

    A feathered edge fades over about `options.feather` of the picture's shorter side.
    """
    if item.mask is None or not (options.feather or options.invert):
        return item
    mask = _opened(root / item.mask, "L")
    if options.invert:
        mask = ImageChops.invert(mask)
    if options.feather:
        radius = options.feather * min(mask.size) / 2  # a gaussian falls from 84 % to 16 % within twice its deviation
        mask = mask.filter(ImageFilter.GaussianBlur(radius))
    where = str(PurePosixPath(item.file).with_suffix(".soft.mask.png" if options.feather else ".inverse.mask.png"))
    atomic_write(root / where, _png(mask))
    return replace(item, mask=where)


def _opened(path: Path, mode: str) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert(mode)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
