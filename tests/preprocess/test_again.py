"""Preprocessing by hand: a dry run leaves nothing, a second run makes only what is missing, clean removes one stage."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from preprocess import Report, build, ingest
from preprocess import picture as pictures
from preprocess.__main__ import main
from preprocess.clean import clean
from preprocess.survey import survey
from preprocess.types import Item, Skipped
from trainer.args import DataArgs, LimitsArgs
from trainer.rundir import RunDir, RunDirError

INGEST = importlib.import_module("preprocess.ingest")  # the package's `ingest` is the function


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for index, size in enumerate([(64, 64), (64, 32), (32, 64)]):
        Image.new("RGB", size, (index * 60, 90, 120)).save(folder / f"p{index}.png")
        (folder / f"p{index}.txt").write_text(f"a TOK, number {index}")
    Image.new("L", (64, 64), 255).save(folder / "p0.mask.png")
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that are decoded from here on."""
    seen: list[int] = []
    real = pictures.decode

    def decode(content: bytes, limits: LimitsArgs) -> Image.Image:
        seen.append(len(content))
        return real(content, limits)

    monkeypatch.setattr(INGEST, "decode", decode)
    return seen


def made(source: Path, out: Path, **data: Any) -> list[dict[str, Any]]:
    build(str(source), out, DataArgs.model_validate({"source": "", **data}), resolution=64, step=16)
    return [json.loads(line) for line in (out / "dataset.jsonl").read_text().splitlines()]


def test_again_decodes_nothing_and_says_the_same(source: Path, tmp_path: Path, decoded: list[int]) -> None:
    first = made(source, tmp_path / "out")
    assert len(decoded) == 3
    assert made(source, tmp_path / "out") == first
    assert len(decoded) == 3


def test_again_decodes_what_is_new_missing_changed_or_cut_off(source: Path, tmp_path: Path, decoded: list[int]) -> None:
    first = made(source, tmp_path / "out")
    kept = tmp_path / "out/cache/pictures"

    def cut_off() -> None:
        """The last of what is known of pictures, as a kill would leave it."""
        ledger = min((tmp_path / "out/cache/kept").glob("ingest.*"))
        ledger.write_bytes(ledger.read_bytes()[:-9])

    for harm in (
        lambda: (kept / "p0.png").unlink(),
        lambda: (kept / "p1.png").write_bytes((kept / "p1.png").read_bytes()[:40]),
        cut_off,
    ):
        decoded.clear()
        harm()
        assert made(source, tmp_path / "out") == first
        assert len(decoded) == 1
    decoded.clear()
    Image.new("RGB", (64, 32), "white").save(source / "p1.png")
    Image.new("RGB", (48, 48), "black").save(source / "p3.png")
    names = [row["name"] for row in made(source, tmp_path / "out")]
    assert (len(decoded), names) == (2, ["p0", "p1", "p2", "p3"])
    with Image.open(kept / "p1.png") as shown:
        assert shown.getpixel((0, 0)) == (255, 255, 255)


def test_an_option_makes_only_its_own_stage_anew(source: Path, tmp_path: Path, decoded: list[int]) -> None:
    made(source, tmp_path / "out")
    captions = [row["caption"] for row in made(source, tmp_path / "out", trigger="DOG")]
    assert captions[0] == "DOG, a TOK, number 0"
    assert len(decoded) == 3
    made(source, tmp_path / "out", limits={"side": 8})  # what may be a picture is ingest's own
    assert len(decoded) == 6


def test_an_interrupted_run_has_no_dataset_and_keeps_what_it_had(
    source: Path, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(source, tmp_path / "other")
    made(source, tmp_path / "out", sheet=0)
    (tmp_path / "out/cache/pictures/p2.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(INGEST, "decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(source, tmp_path / "out")
    assert not (tmp_path / "out/dataset.jsonl").exists()  # the old one would speak of other pictures
    decoded.clear()
    assert made(source, tmp_path / "out") == first
    assert len(decoded) == 1


def everything(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_dry_run_tells_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (source / "p1.txt").write_text("no trigger")
    before = everything(tmp_path)
    words = [str(source), "--dry-run", "--resolution", "64", "--step", "16"]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "3 pictures, 0 left out",
        "bucket 48 x 80: 1",
        "bucket 64 x 64: 1",
        "bucket 80 x 48: 1",
        "2 enlarged, at most 1.5 times: p1.png, p2.png",
        "1 captions came without TOK: p1.png",
        "300 steps of 4 pictures, unless runtime.steps says else",
    ]
    assert everything(tmp_path) == before
    (source / "p1.jpg").write_bytes(b"junk")
    assert main([*words, "--upscale_limit", "1.1"]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 3
    assert problems[0].startswith("problem: p1.jpg is left out: it is no picture")
    assert "enlarged 1.5 times" in problems[1]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_survey_counts_and_names_some() -> None:
    items = tuple(
        Item(
            f"p{i}", f"p{i}.png", "0", 32, 32, f"p{i}.jpg", mask="m" if i < 2 else None, bucket=(64, 64), trigger="TOK"
        )
        for i in range(7)
    )
    sources = tuple(item.source for item in items)
    found = survey(Report(items, (Skipped("x", "why"),), ("p0.jpg: note",), sources))
    assert found.pictures == 7
    assert found.facts == (
        "7 pictures, 1 left out",
        "bucket 64 x 64: 7",
        "7 enlarged, at most 2 times: p0.jpg, p1.jpg, p2.jpg, p3.jpg, p4.jpg and 2 more",
        "2 masked",
        "7 captions came without TOK: p0.jpg, p1.jpg, p2.jpg, p3.jpg, p4.jpg and 2 more",
    )
    assert found.problems == ("x is left out: why", "p0.jpg: note")


def test_any_option_of_the_data_section_is_a_flag(source: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = [str(source), "--out", str(out), "--resolution", "64", "--step", "16", "--masks", "--no-flip"]
    assert main([*words, "--trigger=DOG", "--limits.entries", "100", "--repeats", "a=2"]) == 0
    rows = [json.loads(line) for line in (out / "dataset.jsonl").read_text().splitlines()]
    assert rows[0]["caption"] == "DOG, a TOK, number 0"
    assert [row["mask"] is not None for row in rows] == [True, False, False]
    capsys.readouterr()
    assert main([*words, "--trigr", "DOG"]) == 2
    assert capsys.readouterr().err == "preprocess: data.trigr is not an option; did you mean data.trigger?\n"
    assert main([str(source), "--out", str(out), "--limits.entries", "1"]) == 2
    assert main([str(source), "--out", str(out), "--step", "0"]) == 2
    assert main([str(source)]) == 2
    assert "--out is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "said"), [("a run", "is a training run"), ("other things", "holds other things")])
def test_a_folder_of_something_else_is_left_alone(
    kind: str, said: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "cache" if kind == "a run" else out).mkdir(parents=True)
    (out / ("args.json" if kind == "a run" else "thesis.txt")).write_text("{}")
    before = everything(tmp_path)
    assert main([str(source), "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert everything(tmp_path) == before


STAGES = {
    "latents": {"cache/latents/p0.1.safetensors"},
    "text": {"cache/text/a.1.safetensors"},
    "captions": {"cache/captions/p0.1.json", "dataset.jsonl"},
    "masks": {"cache/pictures/p0.mask.png", "dataset.jsonl"},
    "pictures": {
        "cache/pictures/p0.mask.png",
        "cache/pictures/p0.png",
        "cache/kept/ingest.000001.a.jsonl",
        "dataset.jsonl",
    },
}


@pytest.mark.parametrize("stage", STAGES)
def test_clean_removes_just_what_one_stage_keeps(stage: str, tmp_path: Path) -> None:
    paths = {"args.json", "sheet.html", "cache/README", *(name for names in STAGES.values() for name in names)}
    for name in paths:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    count = clean(RunDir(tmp_path), stage)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert paths - left == STAGES[stage]
    assert count == len(STAGES[stage] - {"dataset.jsonl"})
    assert clean(RunDir(tmp_path), stage) == 0


def test_clean_follows_no_link_out_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/latent").write_text("x")
    (tmp_path / "run/cache/latents").mkdir(parents=True)
    os.symlink(tmp_path / "mine", tmp_path / "run/cache/latents/folder")
    os.symlink(tmp_path / "mine/latent", tmp_path / "run/cache/latents/file")
    assert clean(RunDir(tmp_path / "run"), "latents") == 1
    assert (tmp_path / "mine/latent").read_text() == "x"


def test_clean_by_hand(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = made(source, tmp_path / "out", masks=True)
    assert main(["clean", str(tmp_path / "out"), "--stage", "masks"]) == 0
    assert "1 files of masks removed" in capsys.readouterr().out
    assert made(source, tmp_path / "out", masks=True) == first
    assert main(["clean", str(source), "--stage", "masks"]) == 2
    with pytest.raises(SystemExit):
        main(["clean", str(source), "--stage", "everything"])
    with pytest.raises(RunDirError, match="'everything' is no stage"):
        clean(RunDir(tmp_path / "out"), "everything")


def test_ingest_alone_works_on_the_same_cache(source: Path, tmp_path: Path, decoded: list[int]) -> None:
    made(source, tmp_path / "out")
    items, _ = ingest(str(source), tmp_path / "out")
    assert (len(decoded), [item.name for item in items]) == (3, ["p0", "p1", "p2"])
