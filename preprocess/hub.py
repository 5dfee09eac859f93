"""The pictures of a data set on the Hugging Face hub, through the library `datasets`.

Their bytes come as they are: `preprocess.picture` decodes them within its limits, never the library. What it
downloads for `data.hub.streaming` off lies in its own cache (HF_HOME); a streamed one lies in a nameless temporary
file while it is read. The token is the hub client's (HF_TOKEN, or `hf auth login`).
"""

from __future__ import annotations

import importlib
import re
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from preprocess.captionfiles import NAMES, texts, tidy
from preprocess.types import Limits, PictureError, PreprocessError, SourceFile
from trainer.args import HubArgs
from trainer.extras import needed

PREFIX = "hf://datasets/"

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NAME = "file_name"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif")
# What the library lets through of the hub's answers, of damaged files and of options that fit nothing.
_TROUBLE = (OSError, ValueError, KeyError, RuntimeError, EOFError, NotImplementedError, tarfile.TarError,
            zipfile.BadZipFile)  # fmt: skip

_Row = Mapping[str, Any]
_Open = Callable[[str], IO[bytes]]


def dataset_id(source: str) -> str | None:
    """owner/name of a data set that `source` names as hf://datasets/owner/name, or may name as owner/name."""
    name = source.removeprefix(PREFIX)
    if not _ID.fullmatch(name) or (name == source and name.lower().endswith((*_SUFFIXES, ".zip", ".tar"))):
        return None
    return None if name == source and Path(name.partition("/")[0]).exists() else name


@dataclass(frozen=True)
class _Columns:
    image: str
    captions: str | None
    name: str | None


def hub_files(name: str, hub: HubArgs, limits: Limits, scratch: Path | None, stack: ExitStack) -> list[SourceFile]:
    """One file for each row, in the order of rows: by its own name, else as train-000012.png.

    Args:
        name: owner/name.
        scratch: folder of temporary files.
        stack: closes them.

    Raises:
        PreprocessError: the library is missing, the data set cannot be had, or is more than the limits.
    """
    library = _library(name)
    try:
        rows: Any = library.load_dataset(
            PREFIX + name, hub.subset, split=hub.split, revision=hub.revision, streaming=hub.streaming
        )
        columns = _columns(name, rows.features, hub, library)
        # Before anything else: what is done to a stream that decodes, is done to one that goes on decoding.
        rows = rows.decode(False) if hub.streaming else rows.cast_column(columns.image, library.Image(decode=False))
        rows = rows.select_columns([column for column in vars(columns).values() if column])
        open_file = _opener(name, library)
        if hub.streaming:
            return _streamed(name, rows, columns, hub, limits, _spool(scratch, stack), open_file)
        return _stored(name, rows, columns, hub, limits, open_file)
    except PreprocessError:
        raise
    except (*_TROUBLE, library.exceptions.DatasetsError) as error:
        raise PreprocessError(_why(name, error)) from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise PreprocessError(
            f"data.source {name!r} is nothing on this machine; it may be a data set of the Hugging Face hub, "
            f"{needed('hub')}"
        ) from error


def _why(name: str, error: BaseException) -> str:
    """One sentence; the library's own errors often stand for the one that caused them."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split())[:400] or type(error).__name__
    return f"data.source {name!r} is nothing on this machine, and as a data set of the hub it cannot be read: {said}"


def _columns(name: str, features: Any, hub: HubArgs, library: Any) -> _Columns:
    if features is None:
        raise PreprocessError(
            f"{name} does not say what its columns are before it is read; turn data.hub.streaming off"
        )
    have = list(features)
    images = [column for column, feature in features.items() if isinstance(feature, library.Image)]
    if hub.image is not None and hub.image not in images:
        raise PreprocessError(f"data.hub.image is {hub.image!r}, and the columns of pictures are {_listed(images)}")
    if hub.image is None and len(images) != 1:
        raise PreprocessError(
            f"{name} has {len(images)} columns of pictures ({_listed(images)}); name one as data.hub.image"
        )
    if hub.caption is not None and hub.caption not in have:
        raise PreprocessError(f"data.hub.caption is {hub.caption!r}, and the columns are {_listed(have)}")
    caption = hub.caption or next((column for column in NAMES if column in have), None)
    return _Columns(hub.image or images[0], caption, _NAME if _NAME in have else None)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _stored(
    name: str, rows: Any, columns: _Columns, hub: HubArgs, limits: Limits, open_file: _Open
) -> list[SourceFile]:
    """From the library's cache, where each row can be read by itself."""
    count = len(rows) if hub.take is None else min(hub.take, len(rows))
    if count > limits.entries:
        raise PreprocessError(
            f"{name} has {count} rows, and {limits.entries} are allowed (data.limits.entries); take fewer "
            "(data.hub.take)"
        )
    told = rows.select_columns([column for column in (columns.captions, columns.name) if column])
    pictures = rows.with_format("arrow")[:count][columns.image]  # of these columns only the paths are looked at
    given = importlib.import_module("pyarrow.compute").struct_field(pictures, "path").to_pylist()
    paths = _Paths(hub.split)
    files: list[SourceFile] = []
    for at in range(count):
        row: _Row = told[at] if told.column_names else {}
        picture = partial(_of_row, rows, at, columns.image, limits, open_file)
        files.append(_file(paths.of(at, row.get(_NAME) or given[at]), picture, row, columns, limits))
    return files


def _of_row(rows: Any, at: int, column: str, limits: Limits, open_file: _Open) -> bytes:
    return _content(rows[at][column], limits, open_file)


def _file(path: str, read: Callable[[], bytes], row: _Row, columns: _Columns, limits: Limits) -> SourceFile:
    captions = _captions(row, columns)
    if any(len(caption.encode()) > limits.caption_bytes for caption in captions):
        why = f"its caption has more than the {limits.caption_bytes} bytes allowed (data.limits.caption_bytes)"
        return SourceFile(path, partial(_refused, PictureError(why)))
    return SourceFile(path, read, captions=captions, captions_from=f"the column {columns.captions}")


def _streamed(
    name: str, rows: Any, columns: _Columns, hub: HubArgs, limits: Limits, spool: IO[bytes], open_file: _Open
) -> list[SourceFile]:
    """Read once, into a temporary file."""
    paths, lock = _Paths(hub.split), threading.Lock()
    files: list[SourceFile] = []
    for at, row in enumerate(cast("Iterable[_Row]", rows if hub.take is None else rows.take(hub.take))):
        if len(files) == limits.entries:
            raise PreprocessError(
                f"{name} has more than {limits.entries} rows (data.limits.entries); take fewer (data.hub.take)"
            )
        try:
            content = _content(row[columns.image], limits, open_file)
        except PictureError as error:
            read = partial(_refused, error)
        else:
            start = spool.tell()
            if start + len(content) > limits.total_bytes:
                raise PreprocessError(
                    f"{name} has more than {limits.total_bytes} bytes of pictures (data.limits.total_bytes); take "
                    "fewer (data.hub.take)"
                )
            spool.write(content)
            read = partial(_part, spool, lock, start, len(content))
        files.append(
            _file(paths.of(at, row.get(_NAME) or (row[columns.image] or {}).get("path")), read, row, columns, limits)
        )
    return files


def _spool(scratch: Path | None, stack: ExitStack) -> IO[bytes]:
    if scratch:
        scratch.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(tempfile.TemporaryFile(dir=scratch))


def _part(spool: IO[bytes], lock: threading.Lock, start: int, size: int) -> bytes:
    with lock:
        spool.seek(start)
        return spool.read(size)


def _refused(error: PictureError) -> bytes:
    raise error


def _content(value: Any, limits: Limits, open_file: _Open) -> bytes:
    """The bytes of a picture that a row holds or names."""
    cell = cast("dict[str, Any]", value or {})
    content: bytes | None = cell.get("bytes")
    path: str | None = cell.get("path")
    if content is None:
        if path is None:
            raise PictureError("its row holds no picture")
        try:
            with open_file(path) as file:
                content = file.read(limits.file_bytes + 1)
        except _TROUBLE as error:
            raise PictureError(f"it cannot be read: {error}") from error
    if len(content) > limits.file_bytes:
        raise PictureError(f"it has more than {limits.file_bytes} bytes (data.limits.file_bytes)")
    return content


def _opener(name: str, library: Any) -> _Open:
    """Opens the files that rows name: those of this very data set, and no others. A row may name what it likes."""
    caches = [Path(library.config.HF_DATASETS_CACHE), Path(library.config.HF_CACHE_HOME, "hub"),
              Path(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)]  # fmt: skip
    remote = re.compile(rf"(zip://[^:]+::)?{re.escape(PREFIX + name)}@[^:]+")

    def open_file(path: str) -> IO[bytes]:
        if remote.fullmatch(path):
            files: Any = importlib.import_module("datasets.utils.file_utils")
            return files.xopen(path, "rb")
        local = Path(path).resolve()
        if not any(local.is_relative_to(cache.resolve()) for cache in caches):
            raise ValueError(f"its row names {path[:200]!r}, which is no file of this data set")
        return local.open("rb")

    return open_file


def _captions(row: _Row, columns: _Columns) -> tuple[str, ...]:
    cell = row.get(columns.captions) if columns.captions else None
    return tuple(caption for text in texts(cell) if (caption := tidy(text)))


class _Paths:
    """A path for each row, which no other has: that of its file, else of its number."""

    def __init__(self, split: str) -> None:
        self._split = re.sub(r"[^\w-]+", "-", split).strip("-") or "row"
        self._taken: set[str] = set()

    def of(self, at: int, name: object) -> str:
        own = _safe(name) if isinstance(name, str) else None
        path = own or f"{self._split}-{at:06d}.png"
        if path.lower() in self._taken:
            given = PurePosixPath(path)
            path = f"{given.stem}-{at:06d}{given.suffix}"
        self._taken.add(path.lower())
        return path


def _safe(name: str) -> str | None:
    """The last part of a file's name, if that is a picture's, without what hides it or makes it a mask."""
    path = PurePosixPath(name.replace("\\", "/"))
    stem = re.sub(r"[^\w()+ -]+", "_", path.stem).strip("_ ")[:100]
    return stem + path.suffix if stem and path.suffix.lower() in _SUFFIXES else None
