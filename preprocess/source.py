"""Reads the files of a folder or a zip, and refuses an archive that tries to do harm.

Nothing is extracted: an entry of an archive is read into memory, so no name in it ever becomes a path to write.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from preprocess.types import Limits, PictureError, PreprocessError

_JUNK = {"thumbs.db", "desktop.ini"}
_SMALL = 2**20  # bytes; below this no compression ratio is a bomb
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: its relative path with forward slashes, and a way to its bytes."""

    path: str
    read: Callable[[], bytes]  # raises PictureError


@contextmanager
def opened(source: str, limits: Limits) -> Generator[list[SourceFile]]:
    """The files of a folder or a .zip in the order of their paths; hidden and system files are left out.

    Raises:
        PreprocessError: nothing is there, it is neither folder nor zip, or the archive is hostile.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        yield _folder(path, limits)
    elif not path.exists():
        raise PreprocessError(f"data.source {source!r} does not exist; give a folder or a .zip of pictures")
    elif not zipfile.is_zipfile(path):
        raise PreprocessError(f"data.source {source!r} is neither a folder nor a zip archive of pictures")
    else:
        with _archive(path) as archive:
            yield _entries(archive, source, limits)


def _hidden(path: PurePosixPath) -> bool:
    return path.name.lower() in _JUNK or any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _folder(root: Path, limits: Limits) -> list[SourceFile]:
    files: list[SourceFile] = []
    for folder, folders, names in os.walk(root):  # links to folders are not followed: they may form circles
        folders.sort()
        for name in names:
            path = Path(folder, name)
            relative = PurePosixPath(path.relative_to(root).as_posix())
            if not _hidden(relative):
                files.append(SourceFile(str(relative), lambda path=path: _read_file(path, limits)))
        if len(files) > limits.entries:
            raise PreprocessError(
                f"{str(root)!r} holds more than {limits.entries} files; give the folder of the pictures"
            )
    return sorted(files, key=lambda file: file.path)


def _read_file(path: Path, limits: Limits) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device would be read for ever
            raise PictureError("it is no regular file")
        if path.stat().st_size > limits.file_bytes:
            raise PictureError(f"it has more than {limits.file_bytes} bytes")
        return path.read_bytes()
    except OSError as error:
        raise PictureError(f"it cannot be read: {error.strerror}") from error


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise PreprocessError(f"the archive {str(path)!r} cannot be opened: {error}") from error


def _entries(archive: zipfile.ZipFile, source: str, limits: Limits) -> list[SourceFile]:
    infos = archive.infolist()
    if len(infos) > limits.entries:
        raise PreprocessError(f"{source!r} is refused: it has {len(infos)} entries, and {limits.entries} are allowed")
    total = sum(info.file_size for info in infos)
    if total > limits.total_bytes:
        raise PreprocessError(
            f"{source!r} is refused: it would unpack to {total} bytes, and {limits.total_bytes} are allowed"
        )
    for info in infos:
        harm = _harm(info, limits)
        if harm:
            raise PreprocessError(f"{source!r} is refused: its entry {info.filename!r} {harm}")
    files = {info.filename.replace("\\", "/"): info for info in infos if not info.is_dir()}
    return [
        SourceFile(path, lambda info=info: _read_entry(archive, info))
        for path, info in sorted(files.items())
        if not _hidden(PurePosixPath(path))
    ]


def _harm(info: zipfile.ZipInfo, limits: Limits) -> str | None:
    """Why this entry makes the whole archive untrustworthy, or None."""
    name = info.orig_filename.replace("\\", "/")
    mode = info.external_attr >> 16
    if "\0" in name:
        return "has a zero byte in its name"
    if name.startswith("/") or name[1:2] == ":":
        return "has an absolute path"
    if ".." in PurePosixPath(name).parts:
        return "leads out of the archive"
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device, not a file"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted; give the archive without a password"
    if info.file_size > limits.file_bytes:
        return f"would unpack to {info.file_size} bytes, and {limits.file_bytes} are allowed"
    if info.file_size > _SMALL and info.file_size > limits.ratio * max(info.compress_size, 1):
        return f"would unpack to more than {limits.ratio} times its size"
    return None


def _read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(info) as entry:
            return entry.read(info.file_size)  # never more than was declared, whatever the stream holds
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise PictureError(f"its entry in the archive is damaged: {error}") from error
