"""A run directory is never overwritten; files appear whole; the newest complete checkpoint is found."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from trainer.rundir import RunDir, RunDirError, atomic_write, read_jsonl


def test_create_refuses_what_exists(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "a"
    RunDir.create(root)
    (root / "mine").write_text("keep")
    with pytest.raises(RunDirError, match="never overwritten"):
        RunDir.create(root)
    assert (root / "mine").read_text() == "keep"
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="cannot be made"):
        RunDir.create(tmp_path / "file" / "a")


def test_open_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="not a folder"):
        RunDir.open(tmp_path / "nothing")
    with pytest.raises(RunDirError, match=r"no args\.json"):
        RunDir.open(tmp_path)
    (tmp_path / "args.json").write_text("{}")
    assert RunDir.open(tmp_path).root == tmp_path


def test_newest_checkpoint_is_by_number_and_only_complete_ones(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.newest_checkpoint() is None
    for name in ("step_000020", "step_000100", "step_1000000", ".step_000900.tmp", ".writing-step_2000000", "step_x"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / "step_3000000").write_text("a file is no checkpoint")
    assert [step for step, _ in run.complete_checkpoints()] == [20, 100, 1_000_000]
    assert run.newest_checkpoint() == (1_000_000, run.checkpoint(1_000_000))


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert os.name != "posix" or stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_read_jsonl_forgives_a_cut_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert [line["a"] for line in read_jsonl(path)] == [1, 2]
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(RunDirError, match="line 2"):
        list(read_jsonl(path))
