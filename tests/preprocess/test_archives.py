"""Hostile and odd archives: refused or survived, and never a file written outside the run."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from preprocess import Limits, PreprocessError, ingest


def png(color: str = "red", size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, entries: dict[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in ({"a.png": png(), "b.png": png("blue")} | entries).items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    return path


def link(name: str, target: str) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.create_system = 3  # Unix
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target.encode()


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil.png", "leads out"),
        ("good/../../evil.png", "leads out"),
        ("..\\evil.png", "leads out"),
        ("/tmp/evil.png", "absolute"),
        ("C:\\evil.png", "absolute"),
        ("\\\\host\\evil.png", "absolute"),
    ],
)
def test_a_path_that_leaves_the_archive_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, reason: str
) -> None:
    source = pack(tmp_path / "evil.zip", {name: png("green")})
    before = everything(tmp_path)
    with pytest.raises(PreprocessError, match=reason) as error:
        ingest(str(source), tmp_path / "run")
    assert "evil.png" in str(error.value)
    assert everything(tmp_path) == before


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    info, target = link("c.png", "/etc/hostname")
    with pytest.raises(PreprocessError, match=r"'c\.png' is a link"):
        ingest(str(pack(tmp_path / "link.zip", {info: target})), tmp_path / "run")


def test_a_device_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("c.png")
    info.external_attr = (stat.S_IFCHR | 0o666) << 16
    with pytest.raises(PreprocessError, match="a link or a device"):
        ingest(str(pack(tmp_path / "device.zip", {info: b""})), tmp_path / "run")


def test_a_bomb_by_ratio_is_refused(tmp_path: Path) -> None:
    source = pack(tmp_path / "bomb.zip", {"c.png": bytes(5 * 2**20)})
    with pytest.raises(PreprocessError, match="more than 200 times its size"):
        ingest(str(source), tmp_path / "run")


def test_a_bomb_by_bytes_is_refused(tmp_path: Path) -> None:
    source = pack(tmp_path / "big.zip", {"c.png": bytes(3000)})
    with pytest.raises(PreprocessError, match=r"would unpack to \d+ bytes, and 2000 are allowed"):
        ingest(str(source), tmp_path / "run", limits=Limits(total_bytes=2000))
    with pytest.raises(PreprocessError, match=r"'c\.png' would unpack to 3000 bytes, and 2000 are allowed"):
        ingest(str(source), tmp_path / "run", limits=Limits(file_bytes=2000))


def test_a_bomb_by_entries_is_refused(tmp_path: Path) -> None:
    source = pack(tmp_path / "many.zip", {f"{i}.txt": b"x" for i in range(20)})
    with pytest.raises(PreprocessError, match="has 22 entries, and 20 are allowed"):
        ingest(str(source), tmp_path / "run", limits=Limits(entries=20))


def test_an_entry_that_holds_more_than_it_declares_costs_no_more(tmp_path: Path) -> None:
    """The declared size is lowered in both headers, so that only reading it finds out."""
    content = png("green", (300, 300)) + bytes(100_000)
    source = pack(tmp_path / "liar.zip", {"c.png": content})
    raw = source.read_bytes()
    assert raw.count(struct.pack("<L", len(content))) == 2
    source.write_bytes(raw.replace(struct.pack("<L", len(content)), struct.pack("<L", 50)))
    items, skipped = ingest(str(source), tmp_path / "run")
    assert [item.name for item in items] == ["a", "b"]
    assert [skip.file for skip in skipped] == ["c.png"]


def test_an_encrypted_archive_says_so(tmp_path: Path) -> None:
    source = pack(tmp_path / "secret.zip", {"c.png": png()})
    raw = bytearray(source.read_bytes())
    central = raw.rindex(b"PK\x01\x02")
    raw[central + 8] |= 1  # general purpose flags, bit 0
    source.write_bytes(raw)
    with pytest.raises(PreprocessError, match="encrypted"):
        ingest(str(source), tmp_path / "run")


def test_an_archive_inside_is_named_and_not_opened(tmp_path: Path) -> None:
    inner = pack(tmp_path / "inner.zip", {"c.png": png()}).read_bytes()
    items, skipped = ingest(str(pack(tmp_path / "outer.zip", {"inner.zip": inner})), tmp_path / "run")
    assert [item.name for item in items] == ["a", "b"]
    assert [(skip.file, "archive" in skip.reason) for skip in skipped] == [("inner.zip", True)]


def test_a_damaged_entry_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    source = pack(tmp_path / "bad.zip", {"c.png": png("green", (64, 64))})
    with zipfile.ZipFile(source) as archive:
        start = archive.getinfo("c.png").header_offset
    raw = bytearray(source.read_bytes())
    raw[start + 50] ^= 0xFF
    source.write_bytes(raw)
    items, skipped = ingest(str(source), tmp_path / "run")
    assert [item.name for item in items] == ["a", "b"]
    assert [skip.file for skip in skipped] == ["c.png"]
    assert "damaged" in skipped[0].reason


def test_an_archive_cut_off_is_refused_in_one_sentence(tmp_path: Path) -> None:
    source = pack(tmp_path / "whole.zip", {})
    source.write_bytes(source.read_bytes()[:-30])
    with pytest.raises(PreprocessError, match="cannot be opened: File is not a zip file"):
        ingest(str(source), tmp_path / "run")


def test_folders_and_system_files_in_an_archive(tmp_path: Path) -> None:
    entries: dict[str | zipfile.ZipInfo, bytes] = {
        "set/": b"", "set/dog.png": png("green"), "set/dog.txt": b"a dog",
        "__MACOSX/set/._dog.png": b"junk", "__MACOSX/dog.png": png(), ".DS_Store": b"junk", "set/Thumbs.db": b"junk",
    }  # fmt: skip
    items, skipped = ingest(str(pack(tmp_path / "set.zip", entries)), tmp_path / "run")
    assert [(item.name, item.source, item.caption) for item in items] == [
        ("a", "a.png", ""), ("b", "b.png", ""), ("dog", "set/dog.png", "a dog"),
    ]  # fmt: skip
    assert skipped == []
    assert set(everything(tmp_path / "run/cache/pictures")) == {"a.png", "b.png", "dog.png"}
