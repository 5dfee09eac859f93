"""From a folder to dataset.jsonl: names, captions, masks, buckets, what is left out, and what stops it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import file_size_limit, noise

from preprocess import Item, PreprocessError, buckets, build
from preprocess.__main__ import main
from preprocess.captions import captioned
from preprocess.stages import STAGES
from preprocess.trigger import triggered
from trainer.args import DataArgs

ROOT = Path(__file__).parents[2]


def item(width: int = 64, height: int = 64, caption: str = "") -> Item:
    return Item("a", "cache/pictures/a.png", "0" * 64, width, height, "a.png", caption)


def data(**options: Any) -> DataArgs:
    return DataArgs.model_validate({"source": "", **options})


def folder(tmp_path: Path) -> Path:
    source = tmp_path / "my pictures"
    (source / "more").mkdir(parents=True)
    for name, size in {"dog 1.png": (64, 64), "more/dog 1.jpg": (64, 32), "Dog 1.webp": (32, 64)}.items():
        Image.new("RGB", size, "red").save(source / name)
    (source / "dog 1.txt").write_text("\ufeffa red\n dog ", encoding="utf-8")
    return source


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_names_that_a_terminal_would_obey_are_shown_by_their_codes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (b"a\nb", b"c\x1b[2J", b"d\xff", "e é\u3000日".encode()):
        Image.new("RGB", (32, 32), (name[-1], 0, 0)).save(os.path.join(os.fsencode(source), name + b".png"), "PNG")
        Path(os.fsdecode(os.path.join(os.fsencode(source), name + b".txt"))).write_text("told")
    (source / "no\npicture.png").write_text("")
    report = build(str(source), tmp_path / "run", data(), resolution=32, step=16)
    assert [item.source for item in report.items] == [r"a\nb.png", r"c\x1b[2J.png", r"d\udcff.png", "e é\u3000日.png"]
    assert {item.caption for item in report.items} == {"TOK, told"}
    assert [skip.file for skip in report.skipped] == [r"no\npicture.png"]
    assert all("\n" not in line and "\x1b" not in line for line in caplog.messages)
    assert caplog.messages
    assert {row["source"] for row in lines(tmp_path / "run/dataset.jsonl")} == {item.source for item in report.items}


def test_a_folder_becomes_a_dataset(tmp_path: Path) -> None:
    source, run = folder(tmp_path), tmp_path / "run"
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    report = build(str(source), run, data(trigger="sks"), resolution=64, step=16)

    rows = lines(run / "dataset.jsonl")
    assert [row["name"] for row in rows] == ["Dog_1", "dog_1-2", "dog_1-3"]
    assert [row["source"] for row in rows] == ["Dog 1.webp", "dog 1.png", "more/dog 1.jpg"]
    assert [row["caption"] for row in rows] == ["sks, a red dog", "sks, a red dog", "a sks"]
    assert [row["bucket"] for row in rows] == [[48, 80], [64, 64], [80, 48]]
    assert [(row["width"], row["height"]) for row in rows] == [(32, 64), (64, 64), (64, 32)]
    assert {row["mask"] for row in rows} == {None}
    assert list(rows[0]["stages"]) == ["ingest", *STAGES]
    for row in rows:
        assert hashlib.sha256((run / row["file"]).read_bytes()).hexdigest() == row["sha256"]
        with Image.open(run / row["file"]) as image:
            assert (image.mode, image.size) == ("RGB", (row["width"], row["height"]))
    assert lines(run / "skipped.jsonl") == []
    assert len(report.items) == 3
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def test_the_dataset_is_the_same_every_time(tmp_path: Path) -> None:
    source = folder(tmp_path)
    for run in ("one", "two"):
        build(str(source), tmp_path / run, data(), resolution=64, step=16)
    assert (tmp_path / "one/dataset.jsonl").read_bytes() == (tmp_path / "two/dataset.jsonl").read_bytes()


def test_a_corrupt_picture_among_good_ones_is_named_and_skipped(tmp_path: Path) -> None:
    source, run = folder(tmp_path), tmp_path / "run"
    (source / "broken.png").write_bytes((source / "dog 1.png").read_bytes()[:60])
    (source / "renamed.png").write_text("not a picture")
    (source / "lonely.txt").write_text("a dog")
    (source / "latin.png").write_bytes((source / "dog 1.png").read_bytes())
    (source / "latin.txt").write_bytes("ein Hündchen".encode("latin-1"))
    report = build(str(source), run, data(), resolution=64, step=16)
    assert len(report.items) == 3
    reasons = {row["file"]: row["reason"] for row in lines(run / "skipped.jsonl")}
    assert set(reasons) == {"broken.png", "renamed.png", "lonely.txt", "latin.png"}
    assert "damaged" in reasons["broken.png"]
    assert "no picture in a format" in reasons["renamed.png"]
    assert "belongs to no picture" in reasons["lonely.txt"]
    assert "latin.txt cannot be used" in reasons["latin.png"]


def test_a_picture_under_another_suffix_is_read_by_its_content(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (source / "dog 1.png").rename(source / "scan.dat")
    report = build(str(source), tmp_path / "run", data(), resolution=64, step=16)
    assert "scan.dat" in {row.source for row in report.items}


def test_fewer_than_two_are_refused_with_the_reasons(tmp_path: Path) -> None:
    source = tmp_path / "few"
    source.mkdir()
    with pytest.raises(PreprocessError, match="has no picture, and at least 2 are needed"):
        build(str(source), tmp_path / "run", data(), resolution=64, step=16)
    Image.new("RGB", (32, 32)).save(source / "a.png")
    (source / "b.png").write_bytes(b"junk")
    with pytest.raises(
        PreprocessError, match=r"only one usable picture \(a\.png\).*left out: b\.png: it is no picture"
    ):
        build(str(source), tmp_path / "run", data(), resolution=64, step=16)
    assert not (tmp_path / "run/dataset.jsonl").exists()


def test_a_source_that_is_not_there_or_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match="does not exist"):
        build(str(tmp_path / "nowhere"), tmp_path / "run", data(), resolution=64, step=16)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(PreprocessError, match="neither a folder nor a picture, zip or tar"):
        build(str(tmp_path / "notes.txt"), tmp_path / "run", data(), resolution=64, step=16)


def test_masks_are_read_when_asked_for_and_only_then(tmp_path: Path) -> None:
    source = folder(tmp_path)
    with pytest.raises(PreprocessError, match=r"no picture of .* has a mask"):
        build(str(source), tmp_path / "none", data(masks=True), resolution=64, step=16)
    Image.new("L", (64, 32), 200).save(source / "more/dog 1.mask.png")
    plain = build(str(source), tmp_path / "plain", data(), resolution=64, step=16)
    assert [row.mask for row in plain.items] == [None, None, None]
    masked = build(str(source), tmp_path / "masked", data(masks=True), resolution=64, step=16)
    assert [row.mask for row in masked.items] == [None, None, "cache/pictures/dog_1-3.mask.png"]
    with Image.open(tmp_path / "masked/cache/pictures/dog_1-3.mask.png") as mask:
        assert (mask.mode, mask.size, mask.getpixel((3, 3))) == ("L", (64, 32), 200)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("a photo of TOK", "a photo of TOK"),
        ("a photo", "TOK, a photo"),
        ("a TOKEN", "TOK, a TOKEN"),
        ("a preTOK", "TOK, a preTOK"),
        ("(TOK), blue", "(TOK), blue"),
        ("", "a TOK"),
    ],
)
def test_every_caption_names_the_trigger(tmp_path: Path, own: str, expected: str) -> None:
    (done,) = triggered(captioned([item(caption=own)], tmp_path, data()), data())
    assert done.caption == expected


@given(st.integers(16, 1024), st.sampled_from([8, 16, 32, 64]), st.integers(1, 5000), st.integers(1, 5000))
def test_buckets_keep_their_promises(resolution: int, step: int, width: int, height: int) -> None:
    if resolution < step:
        with pytest.raises(PreprocessError, match="at least"):
            buckets.sizes(resolution, step)
        return
    allowed = buckets.sizes(resolution, step)
    for w, h in allowed:
        assert (w % step, h % step) == (0, 0)
        assert w * h <= resolution * resolution
        assert max(w, h) <= 2 * min(w, h)
    assert (resolution // step * step,) * 2 in allowed

    def mismatch(bucket: tuple[int, int]) -> float:
        ratio = bucket[0] * height / (bucket[1] * width)
        return max(ratio, 1 / ratio)

    chosen = buckets.bucketed(item(width, height), allowed).bucket
    assert mismatch(chosen) <= min(map(mismatch, allowed)) * (1 + 1e-9)


def test_bucket_sizes_by_hand() -> None:
    assert buckets.sizes(64, 16) == [(48, 80), (64, 64), (80, 48)]
    assert buckets.bucketed(item(600, 500), [(48, 80), (64, 64), (80, 48)]).bucket == (64, 64)
    assert buckets.bucketed(item(600, 400), [(48, 80), (64, 64), (80, 48)]).bucket == (80, 48)
    # 0.79 lies nearer 0.6 than 1, but less is cut off for 1: it is the ratio of ratios that counts.
    assert buckets.bucketed(item(790, 1000), [(48, 80), (64, 64), (80, 48)]).bucket == (64, 64)


def test_a_panorama_is_told_that_it_loses_its_ends(tmp_path: Path) -> None:
    source = folder(tmp_path)
    Image.new("RGB", (320, 64)).save(source / "wide.png")
    report = build(str(source), tmp_path / "run", data(), resolution=64, step=16)
    assert [note for note in report.notes if note.startswith("wide.png: 67% of it is cut off")]


def test_a_small_picture_is_told_that_it_is_enlarged(tmp_path: Path) -> None:
    report = build(str(folder(tmp_path)), tmp_path / "run", data(), resolution=256, step=16)
    assert [note for note in report.notes if note.startswith("dog 1.png: its 64 x 64 pixels are enlarged 4.0 times")]


def test_names_differ_where_case_does_not_count(tmp_path: Path) -> None:
    for name in ("a.png", "more/A.png", "more/ä ö.png"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "source" / name)
    report = build(str(tmp_path / "source"), tmp_path / "run", data(dedupe="off"), resolution=32, step=16)
    assert [row.name for row in report.items] == ["a", "A-2", "ä_ö"]


def test_a_caption_that_is_a_book_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (source / "more/dog 1.txt").write_text("word " * 5000)
    report = build(str(source), tmp_path / "run", data(), resolution=64, step=16)
    assert [(skip.file, "25000 bytes, and 20000" in skip.reason) for skip in report.skipped] == [
        ("more/dog 1.jpg", True)
    ]


def test_the_command_line(tmp_path: Path) -> None:
    source = folder(tmp_path)
    command = [sys.executable, "-m", "preprocess", str(source), "--resolution", "64", "--step", "16", "--out"]
    done = subprocess.run([*command, str(tmp_path / "set")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 pictures, 0 left out" in done.stdout
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set/cache").rglob("*")}
    again = subprocess.run([*command, str(tmp_path / "set")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set/cache").rglob("*")} == before
    taken = subprocess.run([*command, str(source)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert taken.returncode == 2
    assert taken.stderr.count("\n") == 1
    assert "holds other things" in taken.stderr


def test_no_stage_needs_torch() -> None:
    code = "import sys, preprocess.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(("how", "flag"), [(signal.SIGTERM, "--dry-run"), (signal.SIGINT, "--out=OUT")])
def test_stopped_it_says_so_and_leaves_no_temporary_folder(how: signal.Signals, flag: str, tmp_path: Path) -> None:
    source, scratch, out = tmp_path / "source", tmp_path / "scratch", tmp_path / "out"
    source.mkdir()
    scratch.mkdir()
    picture = noise((600, 600), 90).convert("RGB")
    for index in range(80):
        picture.putpixel((0, 0), (index, 0, 0))
        picture.save(source / f"{index}.bmp")
    process = subprocess.Popen(
        [sys.executable, "-m", "preprocess", str(source), flag.replace("OUT", str(out)), "--workers", "0"],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(scratch)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    where = out if "out" in flag else scratch
    deadline = time.monotonic() + 60
    while len(list(where.rglob("*.png"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said.splitlines()[-1]) == (
        130,
        "preprocess: stopped; nothing was left behind"
        if "dry" in flag
        else "preprocess: stopped; the same command goes on from here",
    )
    assert "Traceback" not in said
    assert not list(scratch.iterdir())
    assert not (out / "dataset.jsonl").exists()


def test_a_dry_run_without_room_says_where_it_needs_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path)
    with file_size_limit(40):
        status = main([str(source), "--dry-run", "--workers", "0"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert (status, said.startswith(f"preprocess: {tempfile.gettempdir()} cannot hold the pictures: ")) == (1, True)
    assert said.endswith("make room, or set TMPDIR to another folder")
