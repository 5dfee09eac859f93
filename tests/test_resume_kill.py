"""A run that is killed and resumed ends with the tensors of a run that was not, to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from held import HELD
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.rundir import RunDir, read_jsonl

ROOT = Path(__file__).parents[1]
STEPS = 8
EVERYTHING = [
    *("--text.tokens", "2", "--adapter.rank", "3", "--adapter.dropout", "0.2", "--data.caption_dropout", "0.3"),
    *("--adapter.targets", "attention+ff+conv", "--data.flip", "--objective.offset_noise", "0.05"),
    *("--data.augment.variants", "2", "--data.augment.colour", "0.2", "--data.augment.crop", "0.1"),
    *("--optim.adapter.name", "prodigy", "--optim.adapter.lr", "1", "--optim.adapter.curve", "pivot_adapter"),
    *("--optim.rows.curve", "pivot_rows", "--optim.rows.weight_decay", "0.01"),
    *("--runtime.accumulate", "2", "--runtime.batch_size", "2", "--runtime.steps", str(STEPS)),
    *("--runtime.checkpoint_every", "3", "--runtime.threads", "1", "--runtime.device", "cpu", "--sample.steps", "2"),
    *("--export.layouts", "kohya,diffusers,embedding"),
]


def test_steps_equal_some_steps_sigkill_resume_and_the_rest(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    options = [str(tiny_pictures), "--model.base", str(tiny_base), "--runtime.out", str(tmp_path), *EVERYTHING]
    assert main(["object", *options, "--runtime.name", "whole"]) == 0
    killed = RunDir(tmp_path / "killed")
    held = tmp_path / "held"
    hook = ("--hooks.extra", f"{ROOT}/tests/held.py:Held")
    process = start("object", *options, "--runtime.name", "killed", *hook, **{HELD: str(held)})
    wait_for(process, held)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    newest = killed.newest_checkpoint()
    assert newest is not None
    assert 3 <= newest[0] < STEPS, "it was killed between a checkpoint and the end"
    assert not killed.export.exists()
    resumed = start("--resume", str(killed.root))
    assert resumed.wait(300) == 0, resumed.stderr.read() if resumed.stderr else ""

    whole = RunDir(tmp_path / "whole")
    compare(whole.export / "whole.safetensors", killed.export / "killed.safetensors")
    compare(whole.export / "whole_embedding.safetensors", killed.export / "killed_embedding.safetensors")
    same = "pytorch_lora_weights.safetensors"
    compare(whole.export / same, killed.export / same)
    losses = [[line["loss"] for line in read_jsonl(run.metrics)] for run in (whole, killed)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    for a in sorted(whole.samples.rglob("0*.png")):
        assert a.read_bytes() == (killed.samples / a.relative_to(whole.samples)).read_bytes(), a


def start(*argv: str, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **more}
    )


def wait_for(process: subprocess.Popen[str], file: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if file.exists():
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    process.kill()
    raise AssertionError("it was not held within five minutes")


def compare(a: Path, b: Path) -> None:
    one, two = load_file(a), load_file(b)
    assert one.keys() == two.keys()
    assert len(one) > 0
    moved = 0
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
        moved += bool(tensor.any())
    assert moved, "nothing was trained, so nothing was compared"
