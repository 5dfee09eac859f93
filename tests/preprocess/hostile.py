"""Code that makes hostile and broken inputs: archives, byte by byte where no library would write them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import zstandard
from PIL import Image

SQUEEZE = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: zstandard.ZstdCompressor().compress(content),
}


def png(color: str = "red", size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = {"a.png": png(), "b.png": png("blue")}


def zipped(entries: dict[str, bytes] | None = None, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip with two good pictures and `entries`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in (GOOD | (entries or {})).items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def zip_of(name: str, kind: int) -> bytes:
    """A zip whose entry `name` is of a Unix kind, such as stat.S_IFLNK."""
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, b"/etc/hostname")
    return buffer.getvalue()


def zip_named(raw: bytes) -> bytes:
    """A zip whose entry has exactly these bytes for a name, which ZipInfo would clean."""
    return zipped({"N" * len(raw): png("green")}).replace(b"N" * len(raw), raw)


def patched(content: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """`content` with `value` at `offset` behind the last `signature`."""
    at = content.rindex(signature) + offset
    return content[:at] + value + content[at + len(value) :]


def overlapping_zip() -> bytes:
    """Two entries of the directory that point at the same bytes, as in a bomb of the better sort."""
    noise = bytes(range(256)) * 64
    content = zipped({"c.png": noise, "d.png": noise}, zipfile.ZIP_STORED)
    local, directory, end = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    at = content.index(b"PK\x03\x04", content.index(noise) - 60)
    records = content[directory:end].split(b"PK\x01\x02")[1:]
    shared = [record[:38] + struct.pack("<L", at) + record[42:] for record in records]
    listing = b"".join(b"PK\x01\x02" + record for record in shared)
    kept = content[local : content.index(noise) + len(noise)]
    tail = content[end : end + 16] + struct.pack("<L", len(kept)) + content[end + 20 :]
    return kept + listing + tail


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.USTAR_FORMAT if len(name) < 100 else tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def entry(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """Header and padded content."""
    return header(name, len(content), kind, link) + content + bytes(-len(content) % 512)


def tarred(*blocks: bytes, end: bool = True) -> bytes:
    """A tar of two good pictures, then `blocks`."""
    good = b"".join(entry(name, content) for name, content in GOOD.items())
    return good + b"".join(blocks) + (bytes(1024) if end else b"")


def renamed(raw: bytes, block: bytes) -> bytes:
    """A tar entry with these bytes for a name, and a checksum that fits."""
    return checked(raw.ljust(100, b"\0") + block[100:512]) + block[512:]


def sized(field: bytes, block: bytes) -> bytes:
    """A tar entry with these 12 bytes for its size, and a checksum that fits."""
    return checked(block[:124] + field + block[136:512]) + block[512:]


def checked(block: bytes) -> bytes:
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + f"{sum(blank):06o}\0 ".encode() + block[156:]


def pax(**records: str) -> bytes:
    """A header that says something of the next entry."""
    lines = b""
    for key, value in records.items():
        line = f" {key.replace('__', '.')}={value}\n".encode("utf-8", "surrogateescape")
        length = len(line) + len(str(len(line) + 3))
        lines += str(length).encode() + line if len(str(length)) + len(line) == length else b""
    assert lines
    return entry("pax", lines, tarfile.XHDTYPE)


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


LINK, DEVICE, PIPE = stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO
