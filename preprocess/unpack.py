"""What a file is, by its content; and the tar inside a compressed one, on a nameless temporary file."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, cast

import zstandard

from preprocess import tar
from preprocess.archive import SMALL
from preprocess.types import Limits, PreprocessError

Kind = Literal["zip", "tar", "gz", "bz2", "xz", "zst", "7z", "rar", "html", "other"]

_CHUNK = 2**18  # bytes
_SIP = 2**10  # bytes of zstd, which may be 32 MiB of zeros: its decompressor has no bound on what it gives at once
_WINDOW = 2**27  # bytes; what a decompressor may hold. xz -9 and zstd --ultra --long=27 need no more
_STARTS: dict[bytes, Kind] = {
    b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zst", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar",
}  # fmt: skip
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, zstandard.ZstdError)


def kind(file: IO[bytes]) -> Kind:
    """What the content of `file` is; "other" may still be a picture."""
    file.seek(0)
    start = file.read(tar.BLOCK)
    for magic, name in _STARTS.items():
        if start.startswith(magic):
            return name
    if tar.looks_like_tar(start):
        return "tar"
    return "html" if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")) else "other"


def has_zip(file: IO[bytes]) -> bool:
    """Whether a zip stands behind something else, as in one that unpacks itself."""
    return zipfile.is_zipfile(file)


def unpacked(file: IO[bytes], how: Kind, source: str, limits: Limits, scratch: Path | None) -> IO[bytes]:
    """The content of a compressed file as a temporary file without a name, in the folder `scratch`.

    Raises:
        PreprocessError: it is damaged, or unpacks to too much.
    """
    packed = file.seek(0, 2)
    file.seek(0)
    result = cast("IO[bytes]", tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115 - the caller closes it
    total = 0
    try:
        for chunk in _chunks(file, how):
            total += len(chunk)
            if total > limits.total_bytes:
                raise PreprocessError(
                    f"{source!r} is refused: it unpacks to more than {limits.total_bytes} bytes "
                    "(data.limits.total_bytes)"
                )
            if total > SMALL and total > limits.ratio * packed:
                raise PreprocessError(
                    f"{source!r} is refused: it unpacks to more than {limits.ratio} times its size (data.limits.ratio)"
                )
            _write(result, chunk)
    except PreprocessError:
        result.close()
        raise
    except _DAMAGE as error:
        result.close()
        if isinstance(error, _DiskError):
            raise OSError(*error.args) from error
        raise PreprocessError(f"the archive {source!r} cannot be unpacked: {error}") from error
    return result


class _DiskError(OSError):
    """The temporary file cannot be written: no fault of the archive."""


def _write(file: IO[bytes], chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise _DiskError(*error.args) from error


def _chunks(file: IO[bytes], how: Kind) -> Iterator[bytes]:
    if how == "xz":
        yield from _xz(file)
    elif how == "zst":
        yield from _zst(file)
    else:
        stream = cast("IO[bytes]", gzip.GzipFile(fileobj=file) if how == "gz" else bz2.BZ2File(file))
        while chunk := stream.read(_CHUNK):
            yield chunk


def _xz(file: IO[bytes]) -> Iterator[bytes]:
    """As lzma.LZMAFile, which has no bound on the memory that a stream may ask for."""
    rest = file.read(_CHUNK)
    while rest.strip(b"\0"):
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_WINDOW)
        while not stream.eof:
            yield stream.decompress(rest, _CHUNK)
            rest = file.read(_CHUNK) if stream.needs_input and not stream.eof else b""
            if stream.needs_input and not rest and not stream.eof:
                raise EOFError("it ends early")
        rest = stream.unused_data.lstrip(b"\0") or file.read(_CHUNK)


def _zst(file: IO[bytes]) -> Iterator[bytes]:
    """As the reader of zstandard, which takes a stream that was cut off for one that ended."""
    rest = file.read(_SIP)
    while rest:
        stream = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()
        while not stream.eof:
            if not rest:
                raise EOFError("it ends early")
            yield stream.decompress(rest)
            rest = stream.unused_data if stream.eof else file.read(_SIP)
        rest = rest or file.read(_SIP)
