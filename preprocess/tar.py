"""The entries of an uncompressed tar of unknown origin: where each lies and how long it is.

Python's tarfile believes what headers say of their size (it reads a "long name" of a gigabyte, and walks backwards
for ever on a negative size), so only its parser of single headers is used here.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from typing import IO

BLOCK = 512  # bytes
_LONGEST_EXTENSION = 2**16  # bytes; what a header may say about the next one: names, times, owners
_END = bytes(BLOCK)

_HARM = {
    tarfile.LNKTYPE: "is a hard link, not a file",
    tarfile.SYMTYPE: "is a symbolic link, not a file",
    tarfile.CHRTYPE: "is a device, not a file",
    tarfile.BLKTYPE: "is a device, not a file",
    tarfile.FIFOTYPE: "is a pipe, not a file",
    tarfile.GNUTYPE_SPARSE: "is a sparse file, which is not read here",
}


class TarError(ValueError):
    """The tar is damaged or hostile as a whole."""


@dataclass(frozen=True)
class Member:
    """One entry: its name as given, where its bytes lie in the tar, and what it is."""

    name: str
    offset: int
    size: int
    folder: bool
    harm: str | None  # why nobody should want it


@dataclass
class _Extension:
    """What the headers before an entry say about it."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False


def members(file: IO[bytes], most: int) -> list[Member]:
    """All entries in their order. Names are not judged here.

    Args:
        file: the tar.
        most: entries that are allowed; more of them are not looked at.

    Raises:
        TarError: a header is damaged, lies about its size, or there are too many.
    """
    end = file.seek(0, 2)
    found: list[Member] = []
    extension = _Extension()
    at = 0
    while (header := _header(file, at, end)) is not None:
        data = at + BLOCK
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE,
                           tarfile.XGLTYPE):  # fmt: skip
            _extend(extension, header, _content(file, data, header.size, end))
            size = header.size
        else:
            size = header.size if extension.size is None else extension.size
            member = _member(header, extension, data, size)
            if data + member.size > end:
                raise TarError(f"it ends within its entry {member.name!r}")
            found.append(member)
            if len(found) > most:
                raise TarError(f"it has more than {most} entries (data.limits.entries)")
            extension, size = _Extension(), member.size
        at = data + -(-size // BLOCK) * BLOCK
    return found


def looks_like_tar(start: bytes) -> bool:
    """Whether the first 512 bytes are a tar's header: their checksum says so."""
    try:
        tarfile.TarInfo.frombuf(start[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _header(file: IO[bytes], at: int, end: int) -> tarfile.TarInfo | None:
    """The header at `at`; None at the end of the tar, which is a block of zeros, or nothing."""
    file.seek(at)
    block = file.read(BLOCK)
    if not block or block == _END:
        return None
    if len(block) < BLOCK:
        raise TarError("it ends within a header")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarError(f"its header at byte {at} is damaged: {error}") from error
    if not 0 <= header.size <= end:
        raise TarError(f"its entry {header.name!r} says it has {header.size} bytes, and the whole has {end}")
    return header


def _content(file: IO[bytes], at: int, size: int, end: int) -> bytes:
    if size > _LONGEST_EXTENSION:
        raise TarError(f"a header has an extension of {size} bytes, and {_LONGEST_EXTENSION} are allowed")
    if at + size > end:
        raise TarError("it ends within a header")
    file.seek(at)
    return file.read(size)


def _member(header: tarfile.TarInfo, extension: _Extension, at: int, size: int) -> Member:
    harm = "is a sparse file, which is not read here" if extension.sparse else _HARM.get(header.type)
    if harm is None and header.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE):
        harm = f"is of the unknown type {header.type!r}"
    name = header.name if extension.name is None else extension.name
    folder = header.type == tarfile.DIRTYPE or (header.type == tarfile.AREGTYPE and name.endswith("/"))
    links = header.type in _HARM and header.type != tarfile.GNUTYPE_SPARSE
    return Member(name, at, 0 if folder or links else size, folder, harm)


def _extend(extension: _Extension, header: tarfile.TarInfo, content: bytes) -> None:
    if header.type == tarfile.GNUTYPE_LONGNAME:
        extension.name = content.removesuffix(b"\0").decode("utf-8", "surrogateescape")
    elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        for key, value in _records(content):
            if key == "path":
                extension.name = value
            elif key == "size":
                extension.size = _size(value)
            extension.sparse |= key.startswith("GNU.sparse")


def _size(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise TarError(f"a header says of the next entry that it has {text!r} bytes")
    return int(text)


def _records(content: bytes) -> list[tuple[str, str]]:
    """The "length key=value" lines of a pax header; a length counts its whole line."""
    records: list[tuple[str, str]] = []
    rest = content
    while rest.strip(b"\0"):
        digits, _, _ = rest[:12].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        line = rest[:length]
        key, equals, value = line[len(digits) + 1 :].partition(b"=")
        if not equals or not line.endswith(b"\n") or length > len(rest):
            raise TarError("a header's extension is damaged")
        records.append((key.decode("utf-8", "replace"), value[:-1].decode("utf-8", "surrogateescape")))
        rest = rest[length:]
    return records
