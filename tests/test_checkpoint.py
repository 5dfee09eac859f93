"""Checkpoints: everything comes back to the last bit, and a save that fails leaves nothing behind."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small import LowRank, file_size_limit, make_run, tensors

from trainer import checkpoint
from trainer.checkpoint import CheckpointError, flatten, load, prune, save, unflatten
from trainer.loop import train
from trainer.rundir import RunDir

BOTH: dict[str, Any] = {"adapter": {"name": "prodigy", "lr": 1.0}, "rows": {"weight_decay": 0.1}}


def trained(steps: int = 3) -> Any:
    run = make_run(steps=steps, **BOTH)
    list(train(run))
    return run


def same(a: Any, b: Any) -> bool:
    """Equality of nested state to the last bit, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_optimizer_state_and_tensors_come_back_to_the_last_bit(tmp_path: Path) -> None:
    run, new = trained(steps=12), make_run(**BOTH)
    save(tmp_path / "runs" / "step_000003", 3, run.adapters, run.optimizers, "abc")
    assert load(tmp_path / "runs" / "step_000003", new.adapters, new.optimizers, "abc") == 3
    assert same(tensors(new), tensors(run))
    for name in run.optimizers:
        assert same(new.optimizers[name].state_dict(), run.optimizers[name].state_dict())
    assert new.optimizers["adapter"].param_groups[0]["d"] > 1e-6  # Prodigy's own estimate, a Python float


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_keeps_a_precision_that_is_not_its_parameters(dtype: torch.dtype, tmp_path: Path) -> None:
    """Which torch's own load_state_dict would turn to the parameter's."""
    run, new = trained(), make_run(**BOTH)
    kept = next(iter(run.optimizers["rows"].state.values()))
    kept["exp_avg"] = kept["exp_avg"].to(dtype) / 3
    save(tmp_path / "step_000003", 3, run.adapters, run.optimizers, "abc")
    load(tmp_path / "step_000003", new.adapters, new.optimizers, "abc")
    assert same(new.optimizers["rows"].state_dict(), run.optimizers["rows"].state_dict())


def test_the_files_are_safetensors_and_json_only(tmp_path: Path) -> None:
    run = trained()
    path = save(tmp_path / "step_000003", 3, run.adapters, run.optimizers)
    assert sorted(file.name for file in path.iterdir()) == [
        "adapter.safetensors",
        "optim_adapter.json",
        "optim_adapter.safetensors",
        "optim_rows.json",
        "optim_rows.safetensors",
        "rows.safetensors",
        "state.json",
    ]
    assert json.loads((path / "state.json").read_text())["step"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000003"]


def test_awkward_numbers_survive() -> None:
    value = {
        0: {"step": torch.tensor(3.0), "d": 0.1 + 0.2, "tiny": 5e-324, "n": 7, "on": True, "none": None},
        "betas": (0.9, 0.99),
        "list": [math.inf, -math.inf, -0.0, 2**70, "text"],
        "empty": {},
    }
    found: dict[str, torch.Tensor] = {}
    back = unflatten(json.loads(json.dumps(flatten(value, found))), found)
    assert same(back, value)
    assert math.copysign(1, back["list"][2]) == -1


def test_state_that_cannot_be_named_is_refused() -> None:
    with pytest.raises(TypeError, match="'/state/hook' is a function"):
        flatten({"state": {"hook": same}}, {})


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint_and_no_trace(tmp_path: Path) -> None:
    run = trained()
    save(tmp_path / "step_000003", 3, run.adapters, run.optimizers)
    with file_size_limit(100), pytest.raises(CheckpointError, match=r"step 4 .*step_000004.*--resume"):
        save(tmp_path / "step_000004", 4, run.adapters, run.optimizers)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]
    new = make_run(**BOTH)
    assert load(tmp_path / "step_000003", new.adapters, new.optimizers) == 3


@pytest.mark.parametrize("when", range(1, 10))  # seven files, their folder, its parent
def test_a_full_disk_at_any_moment(when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained()
    save(tmp_path / "step_000003", 3, run.adapters, run.optimizers)
    calls, fsync = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path / "step_000004", 4, run.adapters, run.optimizers)
    for path in tmp_path.iterdir():
        new = make_run(**BOTH)
        assert load(path, new.adapters, new.optimizers) in (3, 4)


def test_a_save_interrupted_by_a_kill_is_not_taken_for_a_checkpoint_and_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, dirs = trained(), RunDir(tmp_path)

    def killed(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            save(dirs.checkpoint(3), 3, run.adapters, run.optimizers)
    assert dirs.newest_checkpoint() is None
    save(dirs.checkpoint(3), 3, run.adapters, run.optimizers)
    assert dirs.newest_checkpoint() == (3, dirs.checkpoint(3))
    assert [path.name for path in dirs.checkpoints.iterdir()] == ["step_000003"]


def test_a_checkpoint_may_be_written_again(tmp_path: Path) -> None:
    run = trained()
    for digest in ("old", "new"):
        save(tmp_path / "step_000003", 3, run.adapters, run.optimizers, digest)
    assert json.loads((tmp_path / "step_000003" / "state.json").read_text())["digest"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_args_that_differ_are_refused(tmp_path: Path) -> None:
    run = trained()
    save(tmp_path / "c", 3, run.adapters, run.optimizers, "old")
    with pytest.raises(CheckpointError, match="other args"):
        load(tmp_path / "c", run.adapters, run.optimizers, "new")


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    run, other = trained(), make_run(**BOTH)
    save(tmp_path / "c", 3, run.adapters, run.optimizers)
    other.optimizers["adapter"].param_groups[0]["param_names"] = ["down.weight", "sideways.weight"]
    with pytest.raises(CheckpointError, match="other parameters than this run's adapter"):
        load(tmp_path / "c", other.adapters, other.optimizers)


@pytest.mark.parametrize("name", ["adapter.safetensors", "optim_rows.json", "optim_rows.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_damaged_checkpoint_is_named(name: str, harm: str, tmp_path: Path) -> None:
    run = trained()
    path = save(tmp_path / "c", 3, run.adapters, run.optimizers)
    if harm == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path, run.adapters, run.optimizers)


def test_two_adapters_of_one_component_are_refused(tmp_path: Path) -> None:
    adapters: list[Any] = [LowRank(), LowRank()]
    with pytest.raises(ValueError, match="share one checkpoint file"):
        save(tmp_path / "c", 1, adapters, {})


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    run, dirs = trained(), RunDir(tmp_path)
    for step in (1, 2, 10):
        save(dirs.checkpoint(step), step, run.adapters, run.optimizers)
    (dirs.checkpoints / "notes").mkdir()
    prune(dirs, 2)
    assert sorted(path.name for path in dirs.checkpoints.iterdir()) == ["notes", "step_000002", "step_000010"]
