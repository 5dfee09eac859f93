"""A corpus of hostile and broken inputs, each with the very sentence that answers it. Nothing is written for any."""

from __future__ import annotations

import re
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import (
    DEVICE,
    GOOD,
    LINK,
    PIPE,
    SQUEEZE,
    entry,
    everything,
    header,
    overlapping_zip,
    patched,
    pax,
    png,
    renamed,
    sized,
    tarred,
    zip_named,
    zip_of,
    zipped,
)  # fmt: skip

from preprocess import Limits, PreprocessError, ingest

GIVE = "give a folder, a picture, a .zip, a .tar (also .gz, .bz2, .xz, .zst), or an http(s) URL of one"
LIMITS = Limits(entries=20, total_bytes=20_000_000, file_bytes=4_000_000)
NOTHING = "data.source {} is neither a folder nor a picture, zip or tar archive; " + GIVE
CONTROL = "has control characters in its name"
LONG = "has a name of more than 255 bytes, or a path of more than 1024"


def refused(name: str, why: str) -> str:
    return f"{{}} is refused: its entry {name!r} {why}".replace("{{}}", "{}")


Make = Callable[[], bytes]

ZIPS: dict[str, tuple[Make, str]] = {
    "up": (lambda: zip_named(b"../evil.png"), refused("../evil.png", "leads out of the archive")),
    "up, later": (lambda: zip_named(b"a/../../evil"), refused("a/../../evil", "leads out of the archive")),
    "up, backslashes": (lambda: zip_named(b"..\\evil.png"), refused("..\\evil.png", "leads out of the archive")),
    "only up": (lambda: zip_named(b".."), refused("..", "leads out of the archive")),
    "absolute": (lambda: zip_named(b"/tmp/evil"), refused("/tmp/evil", "has an absolute path")),
    "drive": (lambda: zip_named(b"C:\\evil.png"), refused("C:\\evil.png", "has an absolute path")),
    "drive, relative": (lambda: zip_named(b"C:evil.png"), refused("C:evil.png", "has an absolute path")),
    "share": (lambda: zip_named(b"\\\\host\\evil"), refused("\\\\host\\evil", "has an absolute path")),
    "device path": (lambda: zip_named(b"\\\\.\\COM1"), refused("\\\\.\\COM1", "has an absolute path")),
    "zero byte": (lambda: zip_named(b"a.png\0.exe"), refused("a.png", "has a zero byte in its name")),
    "newline": (lambda: zip_named(b"a\nb.png"), refused("a\nb.png", CONTROL)),
    "escape": (lambda: zip_named(b"\x1b[2Jb.png"), refused("\x1b[2Jb.png", CONTROL)),
    "backwards": (lambda: zipped({"a\u202egnp.exe": b""}), refused("a\u202egnp.exe", CONTROL)),
    "long name": (lambda: zipped({"n" * 300: b""}), refused("n" * 300, LONG)),
    "long path": (lambda: zipped({"n/" * 600 + "x": b""}), refused("n/" * 600 + "x", LONG)),
    "no name": (lambda: zip_named(b"."), refused(".", "has no name")),
    "link": (lambda: zip_of("c.png", LINK), refused("c.png", "is a link or a device, not a file")),
    "device": (lambda: zip_of("c.png", DEVICE), refused("c.png", "is a link or a device, not a file")),
    "pipe": (lambda: zip_of("c.png", PIPE), refused("c.png", "is a link or a device, not a file")),
    "ratio": (
        lambda: zipped({"c.png": bytes(3_000_000)}),
        refused("c.png", "would unpack to more than 200 times its size (data.limits.ratio)"),
    ),
    "one file": (
        lambda: zipped({"c": bytes(4_000_001)}, 0),
        refused("c", "would unpack to 4000001 bytes, and 4000000 are allowed (data.limits.file_bytes)"),
    ),
    "all files": (
        lambda: zipped({f"{i}": bytes(3_500_000) for i in range(6)}),
        "{} is refused: it would unpack to 21000195 bytes, and 20000000 are allowed (data.limits.total_bytes)",
    ),
    "entries": (
        lambda: zipped({f"{i}": b"" for i in range(19)}),
        "{} is refused: it has 21 entries, and 20 are allowed (data.limits.entries)",
    ),
    "a long directory": (
        lambda: zipped({f"{i}": b"" for i in range(5000)}),
        "the archive {} cannot be opened: its list of entries has 248992 bytes, and 20480 are allowed "
        "(data.limits.entries)",
    ),
    "shared bytes": (overlapping_zip, "{} is refused: its entries share the same bytes, as those of a bomb do"),
    "twice": (
        lambda: zipped({"c.png": b"", "d.png": b""}).replace(b"d.png", b"c.png"),
        "{} is refused: it has 2 entries of the name 'c.png'",
    ),
    "twice, spelt otherwise": (
        lambda: zipped({"x/c.png": b"", "x//c.png": b""}),
        "{} is refused: it has 2 entries of the name 'x/c.png'",
    ),
    "encrypted": (
        lambda: patched(zipped({"c.png": b""}), b"PK\x01\x02", 8, b"\x01"),
        refused("c.png", "is encrypted; give the archive without a password"),
    ),
    "bzip2 in zip": (
        lambda: zipped({}, zipfile.ZIP_BZIP2),
        refused("a.png", "is packed by method 12, which is not read here; pack with deflate, as is usual"),
    ),
    "lzma in zip": (
        lambda: zipped({}, zipfile.ZIP_LZMA),
        refused("a.png", "is packed by method 14, which is not read here; pack with deflate, as is usual"),
    ),
    "cut off": (lambda: zipped()[:-30], "the archive {} cannot be opened: File is not a zip file"),
    "only a start": (lambda: b"PK\x03\x04", "the archive {} cannot be opened: File is not a zip file"),
    "directory elsewhere": (
        lambda: patched(zipped(), b"PK\x05\x06", 12, struct.pack("<L", 10)),
        "the archive {} cannot be opened: Truncated central directory",
    ),
}

TARS: dict[str, tuple[Make, str]] = {
    "up": (lambda: tarred(entry("../evil.png")), refused("../evil.png", "leads out of the archive")),
    "up, later": (lambda: tarred(entry("a/../../e")), refused("a/../../e", "leads out of the archive")),
    "up, backslashes": (lambda: tarred(entry("..\\e")), refused("..\\e", "leads out of the archive")),
    "absolute": (lambda: tarred(entry("/etc/evil")), refused("/etc/evil", "has an absolute path")),
    "drive": (lambda: tarred(entry("C:/evil")), refused("C:/evil", "has an absolute path")),
    "up by pax": (lambda: tarred(pax(path="../evil"), entry("good")), refused("../evil", "leads out of the archive")),
    "up by GNU name": (
        lambda: tarred(entry("L", b"../evil\0", tarfile.GNUTYPE_LONGNAME), entry("good")),
        refused("../evil", "leads out of the archive"),
    ),
    "symbolic link": (
        lambda: tarred(entry("c.png", b"", tarfile.SYMTYPE, "/etc/hostname")),
        refused("c.png", "is a symbolic link, not a file"),
    ),
    "hard link": (
        lambda: tarred(entry("c.png", b"", tarfile.LNKTYPE, "a.png")),
        refused("c.png", "is a hard link, not a file"),
    ),
    "character device": (
        lambda: tarred(entry("c.png", b"", tarfile.CHRTYPE)),
        refused("c.png", "is a device, not a file"),
    ),
    "block device": (lambda: tarred(entry("c", b"", tarfile.BLKTYPE)), refused("c", "is a device, not a file")),
    "pipe": (lambda: tarred(entry("c", b"", tarfile.FIFOTYPE)), refused("c", "is a pipe, not a file")),
    "unknown type": (lambda: tarred(entry("c", b"", b"Q")), refused("c", "is of the unknown type b'Q'")),
    "sparse": (
        lambda: tarred(entry("c", b"", tarfile.GNUTYPE_SPARSE)),
        refused("c", "is a sparse file, which is not read here"),
    ),
    "sparse by pax": (
        lambda: tarred(pax(GNU__sparse__size="9"), entry("c")),
        refused("c", "is a sparse file, which is not read here"),
    ),
    "control": (lambda: tarred(entry("a\x07b")), refused("a\x07b", CONTROL)),
    "zero byte": (
        lambda: tarred(pax(path="a\0b"), entry("good")),
        refused("a\0b", "has a zero byte in its name"),
    ),
    "long name": (
        lambda: tarred(entry("L", b"n" * 300, tarfile.GNUTYPE_LONGNAME), entry("good")),
        refused("n" * 300, LONG),
    ),
    "no name": (lambda: tarred(renamed(b"", entry("c"))), refused("", "has no name")),
    "bytes for a name": (
        lambda: tarred(renamed(b"\xff\xfe/../x", entry("c"))),
        refused("\udcff\udcfe/../x", "leads out of the archive"),
    ),
    "negative size": (
        lambda: tarred(sized(b"\xff" * 11 + b"\x00", entry("c"))),
        "{} is refused: its entry 'c' says it has -256 bytes, and the whole has 4096",
    ),
    "negative size by pax": (
        lambda: tarred(pax(size="-512"), entry("c")),
        "{} is refused: a header says of the next entry that it has '-512' bytes",
    ),
    "size of no number": (
        lambda: tarred(pax(size="١٢"), entry("c")),
        "{} is refused: a header says of the next entry that it has '١٢' bytes",
    ),
    "endless by pax": (
        lambda: tarred(pax(size="9" * 17), entry("c")),
        "{} is refused: it ends within its entry 'c'",
    ),
    "larger than all": (
        lambda: tarred(header("c", 2**30)),
        "{} is refused: its entry 'c' says it has 1073741824 bytes, and the whole has 3584",
    ),
    "a name of a megabyte": (
        lambda: tarred(entry("L", b"n" * 2**20, tarfile.GNUTYPE_LONGNAME)),
        "{} is refused: a header has an extension of 1048576 bytes, and 65536 are allowed",
    ),
    "broken pax": (
        lambda: tarred(entry("p", b"99 path=a\n", tarfile.XHDTYPE), entry("c")),
        "{} is refused: a header's extension is damaged",
    ),
    "endless pax": (
        lambda: tarred(entry("p", b"0 path=a\n", tarfile.XHDTYPE), entry("c")),
        "{} is refused: a header's extension is damaged",
    ),
    "bad checksum": (
        lambda: tarred(entry("c").replace(b"c", b"d", 1)),
        "{} is refused: its header at byte 2048 is damaged: bad checksum",
    ),
    "cut off in a header": (lambda: tarred(entry("c")[:100], end=False), "{} is refused: it ends within a header"),
    "cut off in an entry": (
        lambda: tarred(entry("c", bytes(1000))[:900], end=False),
        "{} is refused: it ends within its entry 'c'",
    ),
    "twice": (lambda: tarred(entry("a.png")), "{} is refused: it has 2 entries of the name 'a.png'"),
    "entries": (
        lambda: tarred(*(entry(f"{i}") for i in range(19))),
        "{} is refused: it has more than 20 entries (data.limits.entries)",
    ),
    "one file": (
        lambda: tarred(entry("c", bytes(4_000_001))),
        refused("c", "would unpack to 4000001 bytes, and 4000000 are allowed (data.limits.file_bytes)"),
    ),
    "all files": (
        lambda: tarred(*(entry(f"{i}", bytes(3_500_000)) for i in range(6))),
        "{} is refused: it would unpack to 21000195 bytes, and 20000000 are allowed (data.limits.total_bytes)",
    ),
}

PACKED: dict[str, tuple[Make, str]] = {
    **{
        f"bomb by ratio, {how}": (
            lambda squeeze=squeeze: squeeze(tarred(entry("c.png", bytes(3_000_000)))),
            "{} is refused: it unpacks to more than 200 times its size (data.limits.ratio)",
        )
        for how, squeeze in SQUEEZE.items()
        if how != "gz"
    },
    "bomb by bytes": (
        lambda: SQUEEZE["gz"](bytes(25_000_000)) + bytes(100_000),
        "{} is refused: it unpacks to more than 20000000 bytes (data.limits.total_bytes)",
    ),
    **{
        f"no tar in {how}": (
            lambda squeeze=squeeze: squeeze(png()),
            f"data.source {{}} is compressed ({how}), but holds no tar; {GIVE}",
        )
        for how, squeeze in SQUEEZE.items()
    },
    "zip in gz": (lambda: SQUEEZE["gz"](zipped()), f"data.source {{}} is compressed (gz), but holds no tar; {GIVE}"),
    "gz in gz": (
        lambda: SQUEEZE["gz"](SQUEEZE["gz"](tarred())),
        f"data.source {{}} is compressed (gz), but holds no tar; {GIVE}",
    ),
    "up in gz": (lambda: SQUEEZE["gz"](tarred(entry("../e"))), refused("../e", "leads out of the archive")),
    "cut off, gz": (
        lambda: SQUEEZE["gz"](tarred())[:-20],
        "the archive {} cannot be unpacked: Compressed file ended before the end-of-stream marker was reached",
    ),
    "cut off, bz2": (
        lambda: SQUEEZE["bz2"](tarred())[:-20],
        "the archive {} cannot be unpacked: Compressed file ended before the end-of-stream marker was reached",
    ),
    "cut off, xz": (lambda: SQUEEZE["xz"](tarred())[:-20], "the archive {} cannot be unpacked: it ends early"),
    "cut off, zst": (lambda: SQUEEZE["zst"](tarred())[:-20], "the archive {} cannot be unpacked: it ends early"),
    "damaged xz": (
        lambda: patched(SQUEEZE["xz"](tarred()), b"\xfd7zXZ\0", 30, b"\xff" * 8),
        "the archive {} cannot be unpacked: Corrupt input data",
    ),
    "memory for zst": (
        lambda: b"\x28\xb5\x2f\xfd\x00\xa0\x01\x00\x00abcdefgh",
        "the archive {} cannot be unpacked: zstd decompressor error: Frame requires too much memory for decoding",
    ),
    "7z": (
        lambda: b"7z\xbc\xaf\x27\x1c" + bytes(99),
        "data.source {} is a 7z archive, which is not read here; pack it as .zip",
    ),
    "rar": (
        lambda: b"Rar!\x1a\x07\x01" + bytes(99),
        "data.source {} is a rar archive, which is not read here; pack it as .zip",
    ),
    "web page": (
        lambda: b"\n<!DOCTYPE HTML><p>Sign in",
        "data.source {} is a web page, not pictures; give the address of the file itself",
    ),
    "empty file": (lambda: b"", NOTHING),
    "text": (lambda: b"just words", NOTHING),
    "zeros": (lambda: bytes(2048), NOTHING),
    "script": (lambda: b"#!/bin/sh\nrm -r .\n", NOTHING),
    "pickle": (lambda: b"\x80\x04\x95" + bytes(40), NOTHING),
    "one picture": (lambda: png(), "{} has only one usable picture (source.bin), and at least 2 are needed"),
    "a picture cut off": (
        lambda: png()[:60],
        "{} has no picture, and at least 2 are needed (left out: source.bin: it is damaged: Truncated File Read)",
    ),
}

CORPUS = {
    f"{group}: {name}": case
    for group, cases in {"zip": ZIPS, "tar": TARS, "file": PACKED}.items()
    for name, case in cases.items()
}  # fmt: skip


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 60


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.filterwarnings("ignore:Duplicate name")  # of zipfile, which makes them
def test_hostile_input_is_answered_by_its_sentence(tmp_path: Path, name: str) -> None:
    make, sentence = CORPUS[name]
    source = tmp_path / "source.bin"  # no suffix helps to know it
    source.write_bytes(make())
    before = everything(tmp_path)
    with pytest.raises(PreprocessError) as error:
        ingest(str(source), tmp_path / "run", limits=LIMITS)
    assert str(error.value) == sentence.replace("{}", repr(str(source)))
    after = everything(tmp_path)
    ours = {path for path in after if path == "run" or path.startswith("run/")}
    kept = r"run(/cache(/pictures(/source\.png)?|/kept(/ingest\.[0-9]{6}\.[0-9a-f]+\.jsonl)?)?)?"
    assert all(re.fullmatch(kept, path) for path in ours)
    assert {path: content for path, content in after.items() if path not in ours} == before


@pytest.mark.parametrize("how", ["gz", "bz2", "xz", "zst"])
def test_a_bomb_costs_little_memory(tmp_path: Path, how: str) -> None:
    """60 MB of zeros in little: what is held at a time is counted. (32 MiB is what 1 KiB of zstd may hold.)"""
    source = tmp_path / "bomb"
    source.write_bytes(SQUEEZE[how](bytes(60_000_000)) + (bytes(1_000_000) if how == "gz" else b""))
    tracemalloc.start()
    try:
        with pytest.raises(PreprocessError, match="unpacks to more than"):
            ingest(str(source), tmp_path / "run", limits=Limits(total_bytes=50_000_000))
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


def test_names_that_differ_only_in_case_overwrite_nothing(tmp_path: Path) -> None:
    source = tmp_path / "case.tar"
    source.write_bytes(tarred(entry("A.png", png("green")), entry("x/a.PNG", png("yellow"))))
    items, _ = ingest(str(source), tmp_path / "run")
    assert sorted(item.source for item in items) == ["A.png", *GOOD, "x/a.PNG"]
    assert len({item.name.lower() for item in items}) == len({item.sha256 for item in items}) == 4
