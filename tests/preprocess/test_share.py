"""Several ranks on one folder: each makes its part, and all end with the dataset that one alone would have made."""

from __future__ import annotations

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small import noise

from preprocess import Report, build, sheet
from trainer.args import DataArgs
from trainer.share import ALONE, Share

MASKS = importlib.import_module("preprocess.masks")
INGEST = importlib.import_module("preprocess.ingest")  # the package's `ingest` is the function


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Nine pictures, a copy among them, and one that is damaged."""
    folder = tmp_path / "source"
    folder.mkdir()
    for index in range(9):
        noise((64, 48), 80 + index % 8, seed=index).convert("RGB").save(folder / f"p{index}.png")
    (folder / "p8.png").write_bytes((folder / "p1.png").read_bytes())
    (folder / "p3.png").write_bytes((folder / "p3.png").read_bytes()[:99])
    (folder / "p2.txt").write_text("a TOK, told")
    return folder


def made(source: Path, out: Path, share: Share = ALONE, **data: Any) -> Report:
    return build(str(source), out, DataArgs.model_validate({"source": "", **data}), 64, 16, share=share)


def test_parts_are_the_whole() -> None:
    work = list("abcdefg")
    parts = [Share(rank, 3).of(work) for rank in range(3)]
    assert parts == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    assert ALONE.of(work) == work


@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_end_with_the_dataset_of_one(
    processes: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = made(source, tmp_path / "alone", dedupe="near")
    writers: list[int] = []
    real = sheet.write

    def write(*arguments: Any) -> list[Path]:
        writers.append(threading.get_ident())
        return real(*arguments)

    monkeypatch.setattr(sheet, "write", write)
    barrier = threading.Barrier(processes, timeout=120)
    shares = [Share(rank, processes, lambda: barrier.wait() and None) for rank in range(processes)]
    with ThreadPoolExecutor(processes) as ranks:
        reports = list(ranks.map(lambda share: made(source, tmp_path / "ranks", share, dedupe="near"), shares))
    assert reports == [alone] * processes
    assert len(writers) == 1, "the others would write what it writes"
    assert len(alone.items) == 7
    for name in ("dataset.jsonl", "skipped.jsonl", "survey.json", "sheet.html", "sheet.png"):
        assert (tmp_path / "ranks" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


OWN = """
from contextlib import contextmanager
from pathlib import Path
from PIL import Image, ImageOps

class Bright:
    version = 1
    def __init__(self, options):
        pass
    def parameters(self):
        return {}
    @contextmanager
    def loaded(self):
        def find(pictures):
            with open(Path(__file__).with_suffix(".txt"), "a") as file:
                file.write("x" * len(pictures))
            greys = [picture.convert("L") for picture in pictures]
            return [grey if grey.getextrema()[0] < 150 else None for grey in greys]
        yield find
"""


def test_masks_are_found_by_the_first_and_finished_by_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bright.py").write_text(OWN)
    (source / "p0.png").write_bytes((source / "p2.png").read_bytes())
    noise((64, 48), 20).point([200 + value // 8 for value in range(256)]).save(source / "p6.png")
    mask = {"sources": ["sidecar", f"{tmp_path}/bright.py:Bright"], "feather": 0.1}
    options = {"masks": True, "mask": mask, "dedupe": "off"}
    Image.new("L", (64, 48), 255).save(source / "p7.mask.png")
    alone = made(source, tmp_path / "alone", **options)
    assert [item.name for item in alone.items if item.mask is None] == ["p6"]
    found = tmp_path / "bright.txt"
    assert len(found.read_text()) == 7
    by: dict[int, int] = {}
    real = MASKS.kept

    def kept(*arguments: Any) -> str:
        by[threading.get_ident()] = by.get(threading.get_ident(), 0) + 1
        return real(*arguments)

    monkeypatch.setattr(MASKS, "kept", kept)
    barrier = threading.Barrier(2, timeout=120)
    shares = [Share(rank, 2, lambda: barrier.wait() and None) for rank in range(2)]
    with ThreadPoolExecutor(2) as ranks:
        reports = list(ranks.map(lambda share: made(source, tmp_path / "ranks", share, **options), shares))
    assert reports == [alone] * 2
    assert len(found.read_text()) == 14
    assert sorted(by.values()) == [3, 4]
    for item in alone.items:
        if item.mask:
            assert (tmp_path / "ranks" / item.mask).read_bytes() == (tmp_path / "alone" / item.mask).read_bytes()


def test_a_rank_makes_its_part_only(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = INGEST.decode

    def decode(content: bytes, limits: Any) -> Image.Image:
        seen.append(threading.get_ident())
        return real(content, limits)

    monkeypatch.setattr(INGEST, "decode", decode)
    (source / "p3.png").unlink()
    barrier = threading.Barrier(2, timeout=120)
    shares = [Share(rank, 2, lambda: barrier.wait() and None) for rank in range(2)]
    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(lambda share: made(source, tmp_path / "out", share), shares))
    assert sorted(seen.count(rank) for rank in set(seen)) == [4, 4]
