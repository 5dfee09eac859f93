"""Reads the entries of a zip or tar of unknown origin, and refuses one that tries to do harm.

Nothing is extracted: an entry is read into memory, so no name in an archive ever becomes a path to write.
One hostile entry refuses the whole archive; a damaged one only itself.
"""

from __future__ import annotations

import stat
import threading
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import IO, cast

from preprocess import tar
from preprocess.types import Limits, PictureError, PreprocessError, SourceFile

SMALL = 2**20  # bytes; below this no compression ratio is a bomb
_ENCRYPTED = 0x1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # Python unpacks the others without a bound on memory
_HERE = (".", "./")  # what `tar -c .` names first: the packed folder itself
_LONGEST_PART = 255  # bytes; of one folder or file name, as on every usual disk
_LONGEST_PATH = 1024  # bytes
_DIRECTORY = 1024  # bytes of a zip's directory for each entry that is allowed; usual ones take about 100
_TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # write the rest of a name backwards


def zip_files(file: IO[bytes], source: str, limits: Limits) -> list[SourceFile]:
    """The files of a zip in the order of their paths. `file` must stay open while they are read.

    Raises:
        PreprocessError: it is no zip, or a hostile one.
    """
    guarded = _Guarded(file, limits.entries * _DIRECTORY)
    try:
        archive = zipfile.ZipFile(cast("IO[bytes]", guarded))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise PreprocessError(f"the archive {source!r} cannot be opened: {error}") from error
    guarded.most = limits.file_bytes
    infos = archive.infolist()
    packed = sum(info.compress_size for info in infos)
    _check_counts(source, len(infos), sum(info.file_size for info in infos), limits)
    if packed > file.seek(0, 2):
        raise PreprocessError(f"{source!r} is refused: its entries share the same bytes, as those of a bomb do")
    for info in infos:
        harm = bad_name(info.orig_filename) or _harm(info, limits)
        if harm:
            raise PreprocessError(f"{source!r} is refused: its entry {info.filename!r} {harm}")
    files = [(_slashed(info.filename), info) for info in infos if not info.is_dir()]
    _check_unique(source, [path for path, _ in files])
    return [SourceFile(path, lambda info=info: _read_entry(archive, info)) for path, info in sorted(files, key=_path)]


def tar_files(file: IO[bytes], source: str, limits: Limits) -> list[SourceFile]:
    """The files of an uncompressed tar in the order of their paths. `file` must stay open while they are read.

    Raises:
        PreprocessError: it is no tar, or a hostile one.
    """
    try:
        members = [m for m in tar.members(file, limits.entries) if not (m.folder and m.name in _HERE)]
    except tar.TarError as error:
        raise PreprocessError(f"{source!r} is refused: {error}") from error
    _check_counts(source, len(members), sum(member.size for member in members), limits)
    for member in members:
        harm = bad_name(member.name) or member.harm
        if harm is None and member.size > limits.file_bytes:
            harm = f"would unpack to {member.size} bytes, and {limits.file_bytes} are allowed (data.limits.file_bytes)"
        if harm:
            raise PreprocessError(f"{source!r} is refused: its entry {member.name!r} {harm}")
    files = [(_slashed(member.name), member) for member in members if not member.folder]
    _check_unique(source, [path for path, _ in files])
    lock = threading.Lock()
    return [
        SourceFile(path, lambda member=member: _read_member(file, lock, member))
        for path, member in sorted(files, key=_path)
    ]


def bad_name(raw: str) -> str | None:
    """Why a name makes the whole archive untrustworthy, or None."""
    name = raw.replace("\\", "/")
    if "\0" in name:
        return "has a zero byte in its name"
    if any(unicodedata.category(letter) == "Cc" or letter in _TURNING for letter in name):
        return "has control characters in its name"
    if name.startswith("/") or name[1:2] == ":":
        return "has an absolute path"
    if ".." in PurePosixPath(name).parts:
        return "leads out of the archive"
    encoded = name.encode("utf-8", "replace")
    if len(encoded) > _LONGEST_PATH or any(len(part) > _LONGEST_PART for part in encoded.split(b"/")):
        return f"has a name of more than {_LONGEST_PART} bytes, or a path of more than {_LONGEST_PATH}"
    return None if name.strip("/.") else "has no name"


def _check_counts(source: str, entries: int, total: int, limits: Limits) -> None:
    if entries > limits.entries:
        raise PreprocessError(
            f"{source!r} is refused: it has {entries} entries, and {limits.entries} are allowed (data.limits.entries)"
        )
    if total > limits.total_bytes:
        raise PreprocessError(
            f"{source!r} is refused: it would unpack to {total} bytes, and {limits.total_bytes} are allowed "
            "(data.limits.total_bytes)"
        )


def _check_unique(source: str, paths: Sequence[str]) -> None:
    """Two entries of one name: which of them a program shows is a matter of chance, so neither can be trusted."""
    path, count = next(iter(Counter(paths).most_common(1)), ("", 0))
    if count > 1:
        raise PreprocessError(f"{source!r} is refused: it has {count} entries of the name {path!r}")


def _slashed(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")))


def _path(file: tuple[str, object]) -> str:
    return file[0]


def _harm(info: zipfile.ZipInfo, limits: Limits) -> str | None:
    """Why this entry makes the whole archive untrustworthy, or None."""
    mode = info.external_attr >> 16
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device, not a file"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted; give the archive without a password"
    if info.compress_type not in _METHODS:
        return f"is packed by method {info.compress_type}, which is not read here; pack with deflate, as is usual"
    if info.file_size > limits.file_bytes:
        return f"would unpack to {info.file_size} bytes, and {limits.file_bytes} are allowed (data.limits.file_bytes)"
    if info.file_size > SMALL and info.file_size > limits.ratio * max(info.compress_size, 1):
        return f"would unpack to more than {limits.ratio} times its size (data.limits.ratio)"
    return None


def _read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(info) as entry:
            return entry.read(info.file_size)  # never more than was declared, whatever the stream holds
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise PictureError(f"its entry in the archive is damaged: {error or 'it ends early'}") from error


def _read_member(file: IO[bytes], lock: threading.Lock, member: tar.Member) -> bytes:
    with lock:
        file.seek(member.offset)
        return file.read(member.size)


class _Guarded:
    """A file for zipfile, which reads the whole directory of a zip at once, however large it says that is."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        self.most = most

    def read(self, size: int = -1) -> bytes:
        if size > max(self.most, 2**17):
            raise ValueError(f"its list of entries has {size} bytes, and {self.most} are allowed (data.limits.entries)")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Whoever opened the file closes it."""
