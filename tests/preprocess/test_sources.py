"""Every kind of source gives the same files, whatever its suffix says; several at once are told apart."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hostile import GOOD, SQUEEZE, entry, everything, pax, png, tarred, zipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preprocess import Limits, PictureError, PreprocessError, ingest
from preprocess.source import named, opened, shown_all

LIMITS = Limits(entries=30, total_bytes=3_000_000, file_bytes=1_000_000)


def files_of(source: str, limits: Limits = LIMITS) -> dict[str, bytes]:
    with opened(source, limits) as files:
        return {file.path: file.read() for file in files}


CONTAINERS = {
    "zip": zipped({"c.txt": b"words"}),
    "zip behind a program": b"#!/bin/sh\nexit\n" + zipped({"c.txt": b"words"}),
    "stored zip": zipped({"c.txt": b"words"}, 0),
    "tar": tarred(entry("c.txt", b"words")),
    "tar without its end": tarred(entry("c.txt", b"words"), end=False),
    **{how: squeeze(tarred(entry("c.txt", b"words"))) for how, squeeze in SQUEEZE.items()},
    **{f"{how} in parts": squeeze(tarred(entry("c.txt", b"words"))[:700])
       + squeeze(tarred(entry("c.txt", b"words"))[700:]) for how, squeeze in SQUEEZE.items()},
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("suffix", ["", ".zip", ".tar.gz", ".png"])
def test_content_decides_what_an_archive_is(tmp_path: Path, kind: str, suffix: str) -> None:
    source = tmp_path / f"set{suffix}"
    source.write_bytes(CONTAINERS[kind])
    before = everything(tmp_path)
    assert files_of(str(source)) == GOOD | {"c.txt": b"words"}
    assert everything(tmp_path) == before


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_pythons_tarfile_writes_is_read_as_it_reads_it(tmp_path: Path, form: int) -> None:
    names = ["a.png", "folder/b.txt", "ü/日本.txt", "n" * 90 + "/" + "m" * 60 + ".txt"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for n, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 300 * n, 1.5
            tar.addfile(info, io.BytesIO(bytes([n]) * info.size))
    source = tmp_path / "set.tar"
    source.write_bytes(buffer.getvalue())
    assert files_of(str(source)) == {name: bytes([n]) * 300 * n for n, name in enumerate(names)}


def test_the_tar_that_people_make_of_a_folder_is_read(tmp_path: Path) -> None:
    """`tar -czf pictures.tgz .` begins with an entry for the folder itself, and begins every name with ./"""
    (tmp_path / "in" / "dogs").mkdir(parents=True)
    for name in ("a.png", "dogs/b.png"):
        (tmp_path / "in" / name).write_bytes(png(1))
    subprocess.run(["tar", "-czf", "../pictures.tgz", "."], cwd=tmp_path / "in", check=True)
    with tarfile.open(tmp_path / "pictures.tgz") as tar:
        assert tar.getnames()[0] == "."
    assert files_of(str(tmp_path / "pictures.tgz")) == {"a.png": png(1), "dogs/b.png": png(1)}


def test_a_size_by_pax_is_the_one_that_counts(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(tarred(pax(size="3"), entry("c.txt", b"words"), entry("d.txt", b"more")))
    assert files_of(str(tmp_path / "set.tar")) == GOOD | {"c.txt": b"wor", "d.txt": b"more"}


def test_a_picture_comes_with_what_stands_beside_it(tmp_path: Path) -> None:
    for name, content in {"a.bin": png(), "a.txt": b"red", "a.mask.png": png("white"), "b.png": png("blue")}.items():
        (tmp_path / name).write_bytes(content)
    assert sorted(files_of(str(tmp_path / "a.bin"))) == ["a.bin", "a.mask.png", "a.txt"]
    items, _ = ingest(f"{tmp_path / 'a.bin'}|{tmp_path / 'b.png'}", tmp_path / "run")
    assert [(item.source, item.caption) for item in items] == [("a/a.bin", "red"), ("b/b.png", "")]


@pytest.mark.parametrize("form", ["|", "json"])
def test_several_sources_keep_their_files_apart(tmp_path: Path, form: str) -> None:
    (tmp_path / "set.zip").write_bytes(zipped())
    (tmp_path / "SET.tar").write_bytes(tarred())
    (tmp_path / "more").mkdir()
    (tmp_path / "more/c.png").write_bytes(png("green"))
    sources = [str(tmp_path / name) for name in ("set.zip", "SET.tar", "more")]
    source = json.dumps(sources) if form == "json" else " | ".join(sources)
    assert sorted(files_of(source)) == ["SET-2/a.png", "SET-2/b.png", "more/c.png", "set/a.png", "set/b.png"]
    with pytest.raises(PreprocessError, match="the 3 sources hold more than 4 files together"):
        files_of(source, Limits(entries=4))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("a||b", "names nothing, or has an empty part"),
        ("", "names nothing, or has an empty part"),
        ("[]", "names nothing, or has an empty part"),
        ('["a", 1]', "is a JSON list, but not one of strings"),
        ('["a"', "starts like a JSON list, but is none"),
        ("[" * 100_000, "starts like a JSON list, but is none"),
        ("|".join("abc"), "names 3 sources, and 2 are allowed"),
        ("/no/such/folder", "data.source '/no/such/folder' does not exist; give a folder, a picture"),
        ("x" * 5000, "does not exist; give a folder"),
        ("a\0b", "does not exist; give a folder"),
        ("/dev/null", "is a pipe or a device"),
    ],
)
def test_what_names_no_source(source: str, sentence: str) -> None:
    with pytest.raises(PreprocessError) as error:
        files_of(source, Limits(sources=2))
    assert sentence in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_captions_in_json_beside_their_pictures(tmp_path: Path, kind: str) -> None:
    files = {
        "0001.png": png("red"), "0001.json": b'{"key": "0001", "caption": "a red\\none", "width": 32}',
        "0002.png": png("blue"), "0002.json": b'{"captions": ["a blue one", "blue"]}',
        "0003.png": png("green"), "0003.json": b'{"caption": "unread"}', "0003.txt": b"a green one",
        "0004.png": png("black"), "0004.json": b'{"width": 32, "text": null}',
        "0005.png": png("white"), "0005.json": b"{",
    }  # fmt: skip
    source = tmp_path / "set"
    if kind == "folder":
        source.mkdir()
        for name, content in files.items():
            (source / name).write_bytes(content)
    else:
        content = tarred(*(entry(*file) for file in files.items())) if kind == "tar" else zipped(files)
        source.write_bytes(content)
    items, skipped = ingest(str(source), tmp_path / "run")
    found = {item.source: (item.captions or (item.caption,), item.caption_from) for item in items}
    assert {name: found[name] for name in found if name[0] == "0"} == {
        "0001.png": (("a red one",), "0001.json"),
        "0002.png": (("a blue one", "blue"), "0002.json"),
        "0003.png": (("a green one",), "0003.txt"),
        "0004.png": (("",), ""),
    }
    assert [skip.file for skip in skipped] == ["0005.png"]
    assert skipped[0].reason.startswith("its caption 0005.json cannot be used: it is no JSON: ")


def test_shards_are_named_by_a_range(tmp_path: Path) -> None:
    for n in range(8, 12):
        (tmp_path / f"set-{n:03d}.tar").write_bytes(entry(f"{n}.png", png()) + entry(f"{n}.txt", b"words"))
    assert sorted(files_of(str(tmp_path / "set-{009..011}.tar"))) == [
        "set-009/9.png", "set-009/9.txt", "set-010/10.png", "set-010/10.txt", "set-011/11.png", "set-011/11.txt",
    ]  # fmt: skip
    assert named("https://h/{8..9}.tar|b", LIMITS) == ["https://h/8.tar", "https://h/9.tar", "b"]
    for wrong in ("set-{9..8}.tar", "set-{0..999999999}.tar"):
        with pytest.raises(PreprocessError, match=r"must rise, by no more than 100 \(data\.limits\.sources\)"):
            named(wrong, LIMITS)
    with pytest.raises(PreprocessError, match=r"set-012\.tar' does not exist"):
        files_of(str(tmp_path / "set-{011..012}.tar"))


def test_a_name_with_a_bar_that_exists_is_one_source(tmp_path: Path) -> None:
    (tmp_path / "a|b").mkdir()
    assert named(str(tmp_path / "a|b"), LIMITS) == [str(tmp_path / "a|b")]
    (tmp_path / "c{1..2}").mkdir()
    assert named(f"{tmp_path}/c{{1..2}}|d{{1..2}}", LIMITS) == [f"{tmp_path}/c{{1..2}}", "d1", "d2"]


def test_keys_in_urls_are_not_shown() -> None:
    assert shown_all('["https://h/a?k=1", "b"]|http://u:p@h/c?k#f') == '["https://h/a", "b"]|http://h/c'


ARCHIVES = [CONTAINERS[kind] for kind in ("zip", "stored zip", "tar", "gz", "bz2", "xz", "zst")]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """An archive with bytes changed, cut out, doubled or cut off."""
    content = bytearray(draw(st.sampled_from(ARCHIVES)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        size = draw(st.integers(0, 40))
        patch = draw(st.one_of(st.binary(max_size=12), st.just(bytes(content[at : at + size])), st.just(b"\xff" * 8)))
        content[at : at + draw(st.sampled_from([0, len(patch), size]))] = patch
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=mutated())
def test_mutated_archives_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    """No error but our own comes out, nothing is written, and no more is read than the limits allow."""
    source = tmp_path / "source"
    source.write_bytes(content)
    paths: list[str] = []
    total = 0
    said = [str(source)]
    try:
        with opened(str(source), LIMITS, scratch=tmp_path) as files:
            paths += [file.path for file in files]
            for file in files:
                with suppress(PictureError):
                    total += len(file.read())
    except PreprocessError as error:
        said.append(str(error))
    assert str(source) in said[-1]
    assert len(paths) <= LIMITS.entries
    assert not [path for path in paths if path.startswith("/") or ".." in path.split("/")]
    assert total <= LIMITS.total_bytes
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
