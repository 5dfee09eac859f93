"""The files that Cog reads, what a caller may not do, and the parts behind its doors."""

from __future__ import annotations

import ast
import ctypes
import os
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainer import cancel, cog_door, scratch

ROOT = Path(__file__).parents[1]
BUILD = {"gpu", "cuda", "cudnn", "python_version", "python_requirements", "system_packages", "sdk_version", "run"}
DENIED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED", "LIBRARY_PATH", "HF_ENDPOINT")
DENIED_FAMILIES = ("R8_", "REPLICATE_", "CUDA_", "NVIDIA_", "NV_", "PGET_", "KUBERNETES_", "HF_HUB_ENABLE_HF_TRANSFER")


def wrong_in_cog_yaml(text: str) -> list[str]:
    """What Cog 0.23 refuses or calls deprecated, in the ways in which such a file goes wrong."""
    config: Any = yaml.safe_load(text)
    build = config.get("build", {})
    wrong = [f"key {key}" for key in config.keys() - {"build", "environment", "run", "train"}]
    wrong += [f"build.{key}" for key in build.keys() - BUILD]
    wrong += [
        f"build.{key} must be quoted" for key in ("cuda", "python_version") if not isinstance(build.get(key), str)
    ]
    if build.get("python_version") not in ("3.10", "3.11", "3.12", "3.13"):
        wrong.append("build.python_version")
    if not (ROOT / str(build.get("python_requirements"))).is_file():
        wrong.append("build.python_requirements")
    for line in config.get("environment", []):
        name = line.partition("=")[0]
        if not re.match(r"[A-Za-z_]\w*=", line) or name in DENIED or name.startswith(DENIED_FAMILIES):
            wrong.append(f"environment {line}")
    for key, kind in (("run", ast.ClassDef), ("train", ast.FunctionDef)):
        file, _, name = config.get(key, "").partition(":")
        body = ast.parse((ROOT / file).read_text()).body if file and (ROOT / file).is_file() else []
        if not [node for node in body if isinstance(node, kind) and node.name == name]:
            wrong.append(key)
    return wrong


def test_cog_yaml_is_what_cog_takes_today() -> None:
    assert not wrong_in_cog_yaml((ROOT / "cog.yaml").read_text())


@pytest.mark.parametrize(
    ("before", "after", "wrong"),
    [
        ('"3.11"', "3.10", "build.python_version must be quoted"),
        ('cuda: "13.0"', "cuda: 13.0", "build.cuda must be quoted"),
        ("run:", "predict:", "key predict"),
        ("train.py:train", "train.py:main", "train"),
        ("requirements.txt", "nothing.txt", "build.python_requirements"),
        ("gpu: true", "gpu: true\n  python_packages: []", "build.python_packages"),
        ("HF_HUB_DISABLE_TELEMETRY=1", "CUDA_HOME=/x", "environment CUDA_HOME=/x"),
    ],
)
def test_the_rules_find_what_is_wrong(before: str, after: str, wrong: str) -> None:
    text = (ROOT / "cog.yaml").read_text()
    assert before in text
    assert wrong in wrong_in_cog_yaml(text.replace(before, after))


def test_a_caller_cannot_bring_code(tmp_path: Path) -> None:
    evil = tmp_path / "evil.py"
    evil.write_text("raise SystemExit('ran')")
    for args in ('{"adapter": {"kind": "%s:X"}}', '{"model": {"family": "%s:X"}}', '{"hooks": {"extra": ["%s:X"]}}'):
        with pytest.raises(cog_door.TrainingError, match="would import code"):
            cog_door.train({"input_images": tmp_path, "args": args % evil})


@pytest.mark.parametrize("args", ['{"data": {"private_urls": true}}', '{"data": {"limits": {"entries": 1000000}}}'])
def test_a_caller_cannot_reach_into_the_operators_network(tmp_path: Path, args: str) -> None:
    with pytest.raises(cog_door.TrainingError, match="are for the operator of this server"):
        cog_door.train({"input_images": tmp_path, "args": args})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"),
            "out of memory: lower batch_size",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: lower batch_size"),
        (MemoryError(), "out of memory: lower batch_size"),
        (ValueError("one\n  two"), "one two"),
        (KeyError("x"), "KeyError: 'x'; the log of this training has the traceback"),
    ],
)
def test_what_a_caller_is_told(error: Exception, said: str) -> None:
    assert cog_door.explained(error).startswith(said)
    assert "\n" not in cog_door.explained(error)


class Cancelled(BaseException):
    """As Cog's exception comes: into the waiting thread."""


def interrupted(work: cancel.Work[Any], begun: threading.Event) -> None:
    """Cancels the thread that waits for `work`, once the job has begun."""
    waiting = threading.get_ident()

    def strike() -> None:
        assert begun.wait(120)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(waiting), ctypes.py_object(Cancelled))

    threading.Thread(target=strike).start()
    with pytest.raises(Cancelled):
        work.result()


def test_work_is_ended_where_it_says_that_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel, "GRACE_S", 60.0)
    done: list[str] = []
    begun = threading.Event()

    def job(work: cancel.Work[None]) -> None:
        work.whole = True
        begun.set()
        assert work.asked.wait(120)
        time.sleep(0.1)  # an interruption would come here
        done.append("saved")
        raise KeyboardInterrupt

    interrupted(cancel.Work(job), begun)
    assert done == ["saved"]


def test_work_that_is_at_nothing_whole_is_interrupted_anywhere() -> None:
    cleaned, begun = threading.Event(), threading.Event()

    def job(work: cancel.Work[None]) -> None:
        try:
            begun.set()
            while True:
                time.sleep(0.01)
        finally:
            cleaned.set()

    interrupted(cancel.Work(job), begun)
    assert cleaned.wait(60)


def test_work_hands_its_result_and_its_failure_on() -> None:
    assert cancel.Work(lambda work: 5).result() == 5
    with pytest.raises(ZeroDivisionError):
        cancel.Work(lambda work: 1 // 0).result()


def test_temporary_folders_of_the_gone_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("tempera-1-alive", "tempera-99999999-gone", "somebody-else", "tempera-theirs"):
        (tmp_path / name).mkdir()
    own = scratch.folder()
    spilled = tmp_path / "coglet/predictions/p/outputs"
    spilled.mkdir(parents=True)
    for name, age in (("spill_old.json", 3600), ("spill_new.json", 0), ("kept.json", 3600)):
        (spilled / name).write_text("{}")
        os.utime(spilled / name, (time.time() - age,) * 2)
    for name, text, age in (("tmp12345678x.zip", "", 3600), ("tmp12345678y", "", 0), ("tmp12345678z", "full", 3600)):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    scratch.sweep()
    assert not own.exists()
    folders = {"tempera-1-alive", "somebody-else", "tempera-theirs", "coglet"}
    assert {path.name for path in tmp_path.iterdir()} == folders | {"tmp12345678y", "tmp12345678z"}
    assert {path.name for path in spilled.iterdir()} == {"spill_new.json", "kept.json"}
