"""Several processes: the same answers in the same order, errors where they belong, nothing left running."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from small import noise

from preprocess import PreprocessError, build, crew
from preprocess.crew import Crew
from trainer.args import DataArgs
from trainer.share import Share

ROOT = Path(__file__).parents[2]
log = logging.getLogger("preprocess.tested")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers from the first task on, however few there are."""
    monkeypatch.setattr(crew, "PATIENCE_S", 0.0)
    monkeypatch.setattr(crew, "START_S", 0.0)


def squared(number: int) -> list[int]:
    if number % 5 == 0:
        log.warning("five divides %s", number)
    return [number * number, os.getpid()]


def failing(number: int, error: Exception) -> int:
    if number == 7:
        raise error
    return number


def deadly(number: int) -> int:
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def held(content: bytes) -> int:
    return len(content)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_values_and_words_come_in_order(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    with Crew(workers) as hands:
        values = hands.map("squaring", squared, range(100), name=str)
    assert [value for value, _ in values] == [number * number for number in range(100)]
    pids = {pid for _, pid in values}
    assert pids == {os.getpid()} if workers == 0 else len(pids - {os.getpid()}) == workers
    said = [line for line in caplog.messages if "/s" not in line]  # how far it is, where that takes long
    assert said == [f"five divides {number}" for number in range(0, 100, 5)]
    assert not any(alive(pid) for pid in pids - {os.getpid()})


def test_few_pictures_start_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "PATIENCE_S", 3600.0)
    with Crew(3) as hands:
        assert {pid for _, pid in hands.map("squaring", squared, range(50), name=str)} == {os.getpid()}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no"), MemoryError()])
def test_what_is_raised_comes_through_after_what_was_done(workers: int, error: Exception) -> None:
    done: list[int] = []
    with Crew(workers) as hands, pytest.raises(type(error)) as raised:
        hands.map("f", partial(failing, error=error), range(30), name=str, done=lambda task, _: done.append(task))
    assert (raised.value.args, done) == (error.args, [0, 1, 2, 3, 4, 5, 6])


def test_a_worker_that_is_killed_is_an_error_that_names_where() -> None:
    with (
        Crew(2) as hands,
        pytest.raises(PreprocessError, match=r"ended by signal 9 at 8 or one of the next 7.*data\.work"),
    ):
        hands.map("dying", deadly, range(32), name=str)


def test_what_is_in_flight_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred files of 1 MB with 4 MB allowed: what was packed less what has come back is counted."""
    monkeypatch.setattr(crew, "IN_FLIGHT_BYTES", 4 * 10**6)
    monkeypatch.setattr(crew, "CHUNK_BYTES", 10**6)
    flying, most = 0, 0

    def pack(task: bytes) -> tuple[bytes, int]:
        nonlocal flying, most
        flying += 10**6
        most = max(most, flying)
        return bytes(10**6), 10**6

    def done(task: bytes, value: int) -> None:
        nonlocal flying
        flying -= value

    with Crew(3) as hands:
        assert hands.map("f", held, [b""] * 100, name=str, pack=pack, done=done) == [10**6] * 100
    assert flying == 0
    assert 3 * 10**6 <= most <= 4 * 10**6, "three workers would take six"


def test_ranks_put_their_parts_together_and_hear_of_failures(tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match=r"rank 1 left nothing at .*all ranks must see the same folder"):
        Crew(0, Share(0, 2), tmp_path).map("f", squared, [1, 2, 3], name=str)
    (tmp_path / "f.1.json").write_text(json.dumps({"failed": "OSError: disk"}))
    with pytest.raises(PreprocessError, match="rank 1 failed: OSError: disk"):
        Crew(0, Share(0, 2), tmp_path).map("f", squared, [1, 2, 3], name=str)
    (tmp_path / "f.1.json").write_text(json.dumps({"values": ["theirs"]}))
    values = Crew(0, Share(0, 2), tmp_path).map("f", squared, [1, 2, 3], name=str)
    assert values == [[1, os.getpid()], "theirs", [9, os.getpid()]]
    (tmp_path / "f.1.json").write_text(json.dumps({"values": [1, 2]}))
    with pytest.raises(PreprocessError, match="rank 1 found another number"):
        Crew(0, Share(0, 2), tmp_path).map("f", squared, [1, 2, 3], name=str)


def test_a_rank_that_fails_is_named_by_the_other(tmp_path: Path) -> None:
    barrier = threading.Barrier(2, timeout=120)
    function = partial(failing, error=OSError(28, "No space left"))

    def part(rank: int) -> None:
        share = Share(rank, 2, lambda: barrier.wait() and None)
        Crew(0, share, tmp_path).map("f", function, range(12), name=str)

    with ThreadPoolExecutor(2) as ranks:
        first, second = (ranks.submit(part, rank) for rank in range(2))
    with pytest.raises(OSError, match="No space left"):
        second.result()
    with pytest.raises(PreprocessError, match=r"rank 1 failed: OSError: .*No space left"):
        first.result()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Pictures of many kinds, masks, captions in files and inside; damaged ones, copies, orphans, misread text."""
    folder = tmp_path / "source"
    (folder / "masks").mkdir(parents=True)
    for index in range(24):
        size = (40 + index, 64)
        picture = noise(size, 60, seed=index).convert("RGB")
        ImageDraw.Draw(picture).ellipse((8, 8, 30 + index, 40), fill=(index * 10, 200, 90))
        picture.save(folder / f"p{index:02}.{('png', 'jpg', 'webp')[index % 3]}")
        if index % 4 == 0:
            (folder / f"p{index:02}.txt").write_text(f"a TOK, number {index}")
        if index % 6 == 0:
            mask = Image.new("L", size)
            ImageDraw.Draw(mask).rectangle((index, 5, index + 9, 30), fill=255)
            mask.save(folder / "masks" / f"p{index:02}.png")
    (folder / "p09.png").write_bytes((folder / "p09.png").read_bytes()[:300])
    (folder / "p16.txt").write_bytes(b"\xff\xfe no text")
    (folder / "p15.txt").write_text("of two")
    (folder / "p15.caption").write_text("not this")
    (folder / "p11.caption").write_text("x" * 30_000)
    (folder / "p20.webp").write_bytes((folder / "p08.webp").read_bytes())
    Image.new("L", (9, 9), 255).save(folder / "p13.mask.png")
    (folder / "alone.mask.png").write_bytes(b"?")
    (folder / "notes.md").write_text("no picture")
    return folder


def made(source: Path, out: Path, **data: Any) -> None:
    mask = {"feather": 0.1, "invert": True}
    options = {"source": "", "dedupe": "near", "masks": True, "mask": mask, "crop": "mask", "embedded_captions": True}
    options |= data
    build(str(source), out, DataArgs.model_validate(options), 64, 16)


def packed(folder: Path, how: str) -> Path:
    return folder if how == "folder" else Path(shutil.make_archive(str(folder), how, folder))


@pytest.mark.parametrize(("how", "counts"), [("folder", (1, 2, 3)), ("zip", (1, 2)), ("tar", (1, 2))])
def test_the_dataset_is_the_same_with_any_number_of_workers(
    how: str, counts: tuple[int, ...], source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[list[str]] = []
    for workers in counts:
        caplog.clear()
        made(packed(source, how), tmp_path / f"out{workers}", workers=workers)
        said.append([line for line in caplog.messages if "/s" not in line])
    assert all(lines == said[0] for lines in said)
    assert sum("is left out" in line for line in said[0]) == 5
    for name in ("dataset.jsonl", "skipped.jsonl", "survey.json", "sheet.html", "sheet.png"):
        assert len({(tmp_path / f"out{workers}" / name).read_bytes() for workers in counts}) == 1, name
    rows = [json.loads(line) for line in (tmp_path / "out2/dataset.jsonl").read_text().splitlines()]
    assert len(rows) == 19
    masks = [row["mask"] for row in rows if row["mask"]]
    assert len(masks) == 4
    for name in masks:
        assert len({(tmp_path / f"out{workers}" / name).read_bytes() for workers in counts}) == 1, name
    assert sum(row["centering"] != [0.5, 0.5] for row in rows) > 0


BUILD = """
import signal, sys, time
from pathlib import Path
from preprocess import build, crew
from trainer.args import DataArgs
crew.PATIENCE_S = crew.START_S = 0.0
held = Path(sys.argv[4])

class Held(crew.Progress):  # at the thirtieth picture, for longer than a test takes
    def advance(self, *words, **more):
        super().advance(*words, **more)
        if self.done == 30 and self.what == "decoding" and held.name:
            held.touch()
            time.sleep(600)

crew.Progress = Held
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
build(sys.argv[1], Path(sys.argv[2]), DataArgs(source="", workers=int(sys.argv[3])), 64, 16)
"""


def started(source: Path, out: Path, workers: int, held: str = "") -> subprocess.Popen[bytes]:
    """A build, which makes the file `held` half way and goes no further."""
    command = [sys.executable, "-c", BUILD, str(source), str(out), str(workers), held]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Pictures that take a while together."""
    folder = tmp_path / "many"
    folder.mkdir()
    picture = noise((400, 320), 90).convert("RGB")
    for index in range(80):
        picture.putpixel((0, 0), (index, 0, 0))
        picture.save(folder / f"p{index:02}.bmp")
    return folder


def workers_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes as Linux lists them")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way_it_leaves_no_process_and_does_only_what_is_missing(
    how: signal.Signals, many: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    held, pictures = tmp_path / "held", out / "cache/pictures"
    process = started(many, out, 2, str(held))
    wait_for(held.exists)
    children = workers_of(process.pid)
    process.send_signal(how)
    process.wait(60)
    assert len(children) == 2
    wait_for(lambda: not any(alive(pid) for pid in children))
    assert not (out / "dataset.jsonl").exists()
    before = {path.name: path.stat().st_mtime_ns for path in pictures.glob("[!.]*.png")}
    assert 30 <= len(before) < 80
    again = started(many, out, 0)
    assert again.wait(300) == 0, again.stderr and again.stderr.read()
    redone = [name for name, then in before.items() if (pictures / name).stat().st_mtime_ns != then]
    assert len(redone) <= 2 * 2 * 8  # what was in flight
    assert len((out / "dataset.jsonl").read_text().splitlines()) == 80


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_at_once_on_one_folder_do_no_harm(source: Path, tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    processes = [started(source, both, workers) for workers in (0, 2)]
    build(str(source), alone, DataArgs.model_validate({"source": ""}), 64, 16)
    for process in processes:
        assert process.wait(300) == 0, process.stderr and process.stderr.read()
    assert (both / "dataset.jsonl").read_bytes() == (alone / "dataset.jsonl").read_bytes()
    for row in map(json.loads, (both / "dataset.jsonl").read_text().splitlines()):
        with Image.open(both / row["file"]) as ours, Image.open(alone / row["file"]) as theirs:
            assert ours.tobytes() == theirs.tobytes()
    assert not list(both.rglob(".*"))
