"""Captions that come with pictures: sidecars, tables in their dialects, text inside, several for one picture."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from preprocess import Item, PreprocessError, ingest
from preprocess.captionfiles import CaptionFiles, tidy
from preprocess.types import Limits, SourceFile


def folder(tmp_path: Path, *names: str) -> Path:
    for i, name in enumerate(names or ("a.png", "b.png", "more/c.png")):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 0, 0)).save(path)
    return tmp_path / "source"


def read(source: Path, **options: Any) -> dict[str, Item]:
    items, _ = ingest(str(source), source.parent / "run", **options)
    return {item.source: item for item in items}


def captions(source: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    return {name: item.captions or (item.caption,) for name, item in read(source, **options).items()}


@pytest.mark.parametrize("name", ["captions.csv", "caption.csv", "metadata.csv", "Captions.CSV"])
@pytest.mark.parametrize("header", ["caption,image_file", "file_name,text", "file_name,caption,size"])
def test_a_csv_of_captions(tmp_path: Path, name: str, header: str) -> None:
    source = folder(tmp_path)
    order = header.split(",")
    rows = [("a.png", '"one, two"'), ("B.PNG", "b"), (r"more\c.png", '"has ""quotes"""')]
    values = [
        dict(zip(order, (file, text, "9"), strict=False)) | {"image_file": file, "file_name": file, "caption": text}
        | {"text": text, "size": "9"}
        for file, text in rows
    ]  # fmt: skip
    lines = [",".join(row[column] for column in order) for row in values]
    (source / name).write_text("\ufeff" + "\r\n".join([header, *lines, ""]), encoding="utf-8")
    items = read(source, all_captioned=True)
    assert [item.caption for item in items.values()] == ["one, two", "b", 'has "quotes"']
    assert {item.caption_from for item in items.values()} == {name}
    assert {item.captions for item in items.values()} == {()}


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl", "caption.jsonl"])
def test_jsonl_with_several_captions_beside_their_pictures(tmp_path: Path, name: str) -> None:
    source = folder(tmp_path)
    rows = [
        {"file_name": "c.png", "text": ["first", "second\nline"], "width": 32},
    ]
    (source / "more" / name).write_text("\n\n".join(json.dumps(row) for row in rows))
    top = [{"image_file": "a.png", "caption": "a1"}, {"file_name": "b.png", "text": "b1"}]
    top.append({"file_name": "./a.png", "text": "a2"})
    (source / name).write_text("".join(json.dumps(row) + "\n" for row in top))
    assert captions(source, all_captioned=True) == {
        "a.png": ("a1", "a2"), "b.png": ("b1",), "more/c.png": ("first", "second line"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", "file_name,text\na.png,x\nz.png,y\n", r"captions\.csv cannot be used: line 3 names 'z\.png'"),
        ("captions.csv", "file_name,text\na.png\n", "line 2 has 1 columns instead of 2"),
        ("captions.csv", "file_name,text\na.png,x,y\n", "line 2 has 3 columns instead of 2"),
        ("captions.csv", "file_name,text\na.png,\n", r"line 2 \(a\.png\) has an empty caption"),
        ("captions.csv", "file_name,text\n,x\n", "line 2 has no file_name or image_file"),
        ("captions.csv", "file,words\na.png,x\n", "has the columns file, words in its first line, and it needs one of"),
        ("captions.csv", "", "has the columns none in its first line"),
        ("captions.csv", "text,caption,file_name\nx,y,a.png\n", "it needs one of"),
        ("captions.csv", 'file_name,text\na.png,"x\n', "is no CSV, at line"),
        ("captions.csv", "file_name,text\n../a.png,x\n", r"line 2 names '\.\./a\.png'"),
        ("captions.csv", "file_name,text\n/a.png,x\n", "line 2 names '/a.png'"),
        ("captions.csv", "file_name,text\na.png," + "x" * 20_001 + "\n", "more than the 20000 bytes allowed"),
        ("metadata.jsonl", '{"file_name": "a.png"}', r"line 1 \(a\.png\) has no text or caption"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', r"line 1 \(a\.png\) has no text or caption"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": []}', r"line 1 \(a\.png\) has an empty caption"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["x", null]}', r"line 1 \(a\.png\) has no text or caption"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x", "caption": "y"}', "has no text or caption"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\\ud800"}', "has an empty caption"),
        ("metadata.jsonl", '{"text": "x"}', "line 1 has no file_name or image_file"),
        ("metadata.jsonl", '\n["a.png", "x"]', "line 2 is no JSON object"),
        ("metadata.jsonl", '{"file_name": "a.png", "text"', "line 1 is no JSON object"),
        ("metadata.jsonl", "[" * 100_000, "line 1 is no JSON object"),
    ],
)
def test_a_table_that_cannot_be_used_names_its_rows(tmp_path: Path, name: str, content: str, message: str) -> None:
    source = folder(tmp_path)
    (source / name).write_text(content)
    with pytest.raises(PreprocessError, match=message) as caught:
        ingest(str(source), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_many_wrong_rows_are_counted(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (source / "captions.csv").write_text("file_name,text\n" + "".join(f"x{i}.png,x\n" for i in range(9)))
    with pytest.raises(PreprocessError, match=r"line 6 names 'x4\.png', and there is no such file; and 4 more$"):
        ingest(str(source), tmp_path / "run")


def test_a_table_in_another_encoding(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (source / "captions.csv").write_bytes("file_name,text\na.png,Hündchen\n".encode("latin-1"))
    with pytest.raises(PreprocessError, match=r"captions\.csv cannot be used: 'utf-8' codec"):
        ingest(str(source), tmp_path / "run")


def test_pictures_that_a_table_leaves_out_are_named(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (source / "captions.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(PreprocessError, match=r"no row for 2 of the pictures beside it: b\.png, more/c\.png; add"):
        ingest(str(source), tmp_path / "run", all_captioned=True)
    (source / "b.txt").write_text("b")
    with pytest.raises(PreprocessError, match=r"no row for 1 of the pictures beside it: more/c\.png"):
        ingest(str(source), tmp_path / "run", all_captioned=True)
    assert captions(source) == {"a.png": ("x",), "b.png": ("b",), "more/c.png": ("",)}


def test_a_table_counts_for_its_own_folder_only(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (source / "more/captions.csv").write_text("file_name,text\nc.png,x\n")
    assert captions(source, all_captioned=True) == {"a.png": ("",), "b.png": ("",), "more/c.png": ("x",)}


def test_two_tables_for_one_picture_are_refused(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (source / "captions.csv").write_text("file_name,text\nmore/c.png,x\n")
    (source / "more/metadata.jsonl").write_text('{"file_name": "c.png", "text": "y"}')
    with pytest.raises(PreprocessError, match=r"more/c\.png has captions in captions\.csv and in more/metadata\.jsonl"):
        ingest(str(source), tmp_path / "run")


def test_a_sidecar_comes_before_a_table_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = folder(tmp_path, "a.png", "b.png")
    (source / "captions.csv").write_text("file_name,text\na.png,row\nb.png,row\n")
    (source / "a.txt").write_text("side")
    (source / "b.txt").write_text(" \n")
    with caplog.at_level(logging.WARNING):
        assert captions(source) == {"a.png": ("side",), "b.png": ("row",)}
    assert "a.png: its caption is taken from a.txt, not from captions.csv" in caplog.text
    assert "b.png" not in caplog.text


def test_lines_of_a_sidecar(tmp_path: Path) -> None:
    source = folder(tmp_path, "a.png", "b.png")
    (source / "a.txt").write_text("one \n\n two\r\n")
    (source / "b.caption").write_text("only\n")
    assert captions(source) == {"a.png": ("one two",), "b.png": ("only",)}
    assert captions(source, caption_lines=True) == {"a.png": ("one", "two"), "b.png": ("only",)}


def png_text(path: Path, key: str, text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, text)
    Image.new("RGB", (32, 32), "blue").save(path, pnginfo=info)


def with_exif(path: Path, tag: int, value: Any, *, inner: bool = False) -> None:
    exif = Image.Exif()
    (exif.get_ifd(ExifTags.IFD.Exif) if inner else exif)[tag] = value
    Image.new("RGB", (32, 32), "blue").save(path, exif=exif)


def test_text_inside_pictures_by_option(tmp_path: Path) -> None:
    source = folder(tmp_path, "0.png", "1.png")
    png_text(source / "caption.png", "Caption", "a dog\non grass")
    png_text(source / "made.png", "parameters", "a cat, (best:1.2)\nNegative prompt: dog\nSteps: 20")
    png_text(source / "software.png", "Software", "an editor")
    with_exif(source / "described.jpg", ExifTags.Base.ImageDescription, "a red dog")
    with_exif(source / "windows.jpg", 0x9C9C, "ein Hündchen\0".encode("utf-16-le"))
    with_exif(source / "user.webp", ExifTags.Base.UserComment, b"ASCII\0\0\0a bird", inner=True)
    with_exif(source / "own.jpg", ExifTags.Base.ImageDescription, "inside")
    (source / "own.txt").write_text("outside")
    inside = read(source, embedded_captions=True)
    assert {name: item.caption for name, item in inside.items()} == {
        "0.png": "", "1.png": "", "caption.png": "a dog on grass", "made.png": "a cat, (best:1.2)", "software.png": "",
        "described.jpg": "a red dog", "windows.jpg": "ein Hündchen", "user.webp": "a bird", "own.jpg": "outside",
    }  # fmt: skip
    assert inside["made.png"].caption_from == "the picture itself"
    assert {item.caption for item in read(source).values()} == {"", "outside"}


def test_damaged_or_endless_text_inside_leaves_the_picture_in(tmp_path: Path) -> None:
    source = folder(tmp_path, "0.png", "1.png")
    png_text(source / "long.png", "Caption", "x" * 30_000)
    with_exif(source / "bad.jpg", ExifTags.Base.ImageDescription, "a red dog")
    content = bytearray((source / "bad.jpg").read_bytes())
    at = content.index(b"Exif\0\0") + 6
    content[at + 4 : at + 8] = b"\xff\xff\xff\x7f"  # where the tags are said to begin
    (source / "bad.jpg").write_bytes(content)
    found = captions(source, embedded_captions=True)
    assert (found["long.png"], found["bad.jpg"]) == (("",), ("",))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["captions.csv", "metadata.jsonl"]), st.binary(max_size=300) | st.text(max_size=300))
def test_no_table_makes_another_error_than_its_own(name: str, content: bytes | str) -> None:
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    for start in (b"", b"file_name,text\na.png,", b'{"file_name": "a.png", "text": "'):
        file = SourceFile(name, lambda start=start: start + raw)
        try:
            own = CaptionFiles([file], ["a.png"], Limits.model_validate({})).of("a.png", b"")
        except PreprocessError:
            continue
        assert all(caption and caption == tidy(caption) for caption in own.captions)


def test_tidy_keeps_what_people_write() -> None:
    assert tidy(" a\tb\x00\x1b[31m \ud800c 👩‍🚀 \u00a0") == "a b [31m c 👩‍🚀"
