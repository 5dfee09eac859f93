"""The captions that come with pictures: x.txt or x.json beside x.png, tables of a folder, text inside the picture.

A table is metadata.jsonl, metadata.csv, captions.csv, caption.csv, captions.jsonl or caption.jsonl. Each of its rows
has file_name (or image_file), relative to the table's folder, and text (or caption). Several rows for one picture, or
a list of texts in a row of JSON, are several captions.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast
from unicodedata import category

from preprocess.types import Item, Limits, PictureError, PreprocessError, SourceFile

TABLES = ("metadata.jsonl", "metadata.csv", "captions.csv", "caption.csv", "captions.jsonl", "caption.jsonl")
SIDECARS = (".txt", ".caption", ".json")
NAMES = ("text", "caption", "captions", "prompt", "txt", "json")  # of captions in data sets; the first counts

_FILE = ("file_name", "image_file")
_TEXT = ("text", "caption")
_NAMED = 5  # rows that a message names

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Own:
    """The captions that a picture came with, and the file that they are from."""

    captions: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Near:
    """Where the captions of one picture may be."""

    path: str
    sidecars: tuple[SourceFile, ...]  # the first counts
    row: Own | None  # of a table
    most: int  # bytes of a sidecar
    lines: bool
    inside: Callable[[bytes], str] | None

    def read(self, content: bytes) -> Own:
        """The captions: of the sidecar, else of a table, else from inside the picture's `content`; maybe none.

        Raises:
            PictureError: the sidecar cannot be read.
        """
        own = self._in_files()
        if own is not None:
            return own
        caption = self.inside(content) if self.inside else ""
        return Own((caption,), "the picture itself") if caption else Own((), "")

    def _in_files(self) -> Own | None:
        if not self.sidecars:
            return self.row
        first = self.sidecars[0]
        captions = self._sidecar(first)
        if not captions:
            return self.row
        texts = [file.path for file in self.sidecars[1:] if not _is_json(file.path)]  # which often says the same
        others = texts + ([self.row.source] if self.row else [])
        if others:
            _log.warning("%s: its caption is taken from %s, not from %s", self.path, first.path, " or ".join(others))
        return Own(captions, first.path)

    def _sidecar(self, file: SourceFile) -> tuple[str, ...]:
        try:
            content = file.read()
            if _is_json(file.path):
                return self._in_json(content)
            if len(content) > self.most:
                raise PictureError(
                    f"it has {len(content)} bytes, and {self.most} are allowed (data.limits.caption_bytes)"
                )
            text = content.decode("utf-8-sig")
        except (PictureError, UnicodeDecodeError) as error:
            raise PictureError(f"its caption {file.path} cannot be used: {error}") from error
        lines = text.splitlines() if self.lines else [text]
        return tuple(caption for line in lines if (caption := tidy(line)))

    def _in_json(self, content: bytes) -> tuple[str, ...]:
        """The captions under the usual names; none in JSON that is about something else."""
        try:
            found = texts(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise PictureError(f"it is no JSON: {error}") from error
        captions = tuple(caption for text in found if (caption := tidy(text)))
        if any(len(caption.encode()) > self.most for caption in captions):
            raise PictureError(f"a caption has more than the {self.most} bytes allowed (data.limits.caption_bytes)")
        return captions


@dataclass
class _Table:
    path: str
    by_picture: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    wrong: list[str] = field(default_factory=list[str])  # one clause for each row that cannot be used

    @property
    def folder(self) -> str:
        return str(PurePosixPath(self.path).parent)

    def check(self, what: str = "") -> None:
        if self.wrong:
            more = f"; and {len(self.wrong) - _NAMED} more" if len(self.wrong) > _NAMED else ""
            raise PreprocessError(f"{self.path} cannot be used{what}: {'; '.join(self.wrong[:_NAMED])}{more}")


def is_caption_file(path: str) -> bool:
    """True for a file that holds captions and no picture, by its name."""
    name = PurePosixPath(path)
    return name.suffix.lower() in SIDECARS or name.name.lower() in TABLES


def is_table(path: str) -> bool:
    return PurePosixPath(path).name.lower() in TABLES


class CaptionFiles:
    """All captions of a source, matched to its pictures.

    Raises:
        PreprocessError: a table cannot be read, or one of its rows names no picture; the rows are named.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        pictures: Iterable[str],
        limits: Limits,
        *,
        lines: bool = False,
        inside: Callable[[bytes], str] | None = None,
    ) -> None:
        """Reads the tables.

        Args:
            pictures: paths of the files that may be pictures.
            lines: each line of a sidecar is a caption of its own; else its lines are joined.
            inside: reads the caption in a picture's own bytes, for pictures with none in a file.
        """
        self._limits, self._lines, self._inside = limits, lines, inside
        self._files = {file.path.lower(): file for file in files} | {file.path: file for file in files}
        exact = {path: path for path in pictures}
        self._pictures = {path.lower(): path for path in exact} | exact
        self._tables = [self._table(file) for file in files if is_table(file.path)]
        self._rows: dict[str, Own] = {}
        for table in self._tables:
            for path, captions in table.by_picture.items():
                if path in self._rows:
                    raise PreprocessError(
                        f"{path} has captions in {self._rows[path].source} and in {table.path}; keep one of the two"
                    )
                self._rows[path] = Own(tuple(captions), table.path)

    def of(self, path: str, content: bytes) -> Own:
        """The captions of a picture, whose file holds `content`. Raises PictureError: its sidecar cannot be read."""
        return self.near(path).read(content)

    def near(self, path: str) -> Near:
        """Where the captions of a picture may be; nothing is read yet."""
        before = path.removesuffix(PurePosixPath(path).suffix)
        names = (before + ending for ending in SIDECARS)
        found = (self._files.get(name) or self._files.get(name.lower()) for name in names)
        sidecars = tuple(file for file in found if file)
        own = self._files.get(path)
        told = Own(own.captions, own.captions_from) if own and own.captions else None
        return Near(path, sidecars, self._rows.get(path) or told, self._limits.caption_bytes, self._lines, self._inside)

    def check(self, items: Iterable[Item]) -> None:
        """Raises PreprocessError when a table leaves out pictures of its folder, and nothing else captions them."""
        bare = [item.source for item in items if not item.caption]
        for table in self._tables:
            inside = [path for path in bare if table.folder == "." or path.startswith(f"{table.folder}/")]
            if inside:
                more = f" and {len(inside) - _NAMED} more" if len(inside) > _NAMED else ""
                raise PreprocessError(
                    f"{table.path} has no row for {len(inside)} of the pictures beside it: "
                    f"{', '.join(inside[:_NAMED])}{more}; add the rows, or choose a data.captioner that writes captions"
                )

    def _table(self, file: SourceFile) -> _Table:
        table = _Table(file.path)
        try:
            text = file.read().decode("utf-8-sig")
        except (PictureError, UnicodeDecodeError) as error:
            raise PreprocessError(f"{file.path} cannot be used: {error}") from error
        for line, row in _csv(table, text) if file.path.lower().endswith(".csv") else _jsonl(table, text):
            self._add(table, line, row)
        table.check()
        return table

    def _add(self, table: _Table, line: int, row: Mapping[str, Any]) -> None:
        name, texts = _cell(row, _FILE), _cell(row, _TEXT)
        captions = [texts] if isinstance(texts, str) else texts
        if not isinstance(name, str) or not name:
            table.wrong.append(f"line {line} has no {' or '.join(_FILE)}")
        elif not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            table.wrong.append(f"line {line} ({name}) has no {' or '.join(_TEXT)}")
        elif not captions or not all(tidy(caption) for caption in captions):
            table.wrong.append(f"line {line} ({name}) has an empty caption")
        elif max(len(tidy(caption).encode()) for caption in captions) > self._limits.caption_bytes:
            table.wrong.append(
                f"line {line} ({name}) has more than the {self._limits.caption_bytes} bytes allowed "
                "(data.limits.caption_bytes)"
            )
        elif (path := self._picture(table, name)) is None:
            table.wrong.append(f"line {line} names {name!r}, and there is no such file")
        else:
            table.by_picture.setdefault(path, []).extend(tidy(caption) for caption in captions)

    def _picture(self, table: _Table, name: str) -> str | None:
        path = str(PurePosixPath(table.folder, name.replace("\\", "/")))
        return self._pictures.get(path) or self._pictures.get(path.lower())


def texts(value: Any) -> list[str]:
    """The captions in JSON, or in a cell of a data set: a text, a list of them, or an object that names them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for text in cast("list[Any]", value) if isinstance(text, str)]
    if isinstance(value, dict):
        cells = cast("dict[str, Any]", value)
        return next((found for name in NAMES if (found := texts(cells.get(name)))), [])
    return []


def _is_json(path: str) -> bool:
    return path.lower().endswith(".json")


def tidy(text: str) -> str:
    """On one line, without control characters and halves of characters."""
    return " ".join("".join(" " if category(char) in ("Cc", "Cs") else char for char in text).split())


def _cell(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value under the only one of `names` that the row has, else None."""
    found = [row[name] for name in names if name in row]
    return found[0] if len(found) == 1 else None


def _csv(table: _Table, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if sum(name in header for name in _FILE) != 1 or sum(name in header for name in _TEXT) != 1:
            raise PreprocessError(
                f"{table.path} has the columns {', '.join(header) or 'none'} in its first line, and it needs one of "
                f"{', '.join(_FILE)} and one of {', '.join(_TEXT)}"
            )
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                table.wrong.append(f"line {reader.line_num} has {len(cells)} columns instead of {len(header)}")
            else:
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise PreprocessError(f"{table.path} is no CSV, at line {reader.line_num}: {error}") from error


def _jsonl(table: _Table, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield number, cast(dict[str, Any], row)
        else:
            table.wrong.append(f"line {number} is no JSON object")
