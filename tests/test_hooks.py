"""Hooks, each on a real run of the tiny base: what lands in the run directory, and what a resumed run does to it."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import cli, progress, run
from trainer.events import Gradients
from trainer.hooks import Context, Hook
from trainer.hooks.checkpoints import RESUMABLE, digest, fixed
from trainer.hooks.progress import Progress
from trainer.loop import Run
from trainer.rundir import RunDir, read_jsonl
from trainer.types import Step

STEPS = 4


def tree(base: Path, pictures: Path, out: Path, **sections: Mapping[str, object]) -> cli.TrainArgs:
    common = {
        "data": {"source": str(pictures), "caption_dropout": 0.0},
        "model": {"base": str(base)},
        "text": {"tokens": 1},
        "adapter": {"rank": 2},
        "optim": {"adapter": {"lr": 1e-3, "curve": "cosine"}},
        "sample": {"prompts": ["a red {trigger}", "a star"], "steps": 2, "every": 3, "strengths": [0.5, 1.0]},
        "runtime": {"out": str(out), "steps": STEPS, "batch_size": 2, "checkpoint_every": 2, "device": "cpu"},
    }
    return cli.validate(cli.merge([common, sections]))


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, list[Step]]:
    from conftest import draw_pictures

    out = tmp_path_factory.mktemp("hooks")
    with run.opened(tree(tiny_base, draw_pictures(out / "pictures"), out)) as session:
        return session.dir, list(session.steps())


def test_metrics_are_the_steps(finished: tuple[RunDir, list[Step]]) -> None:
    run_dir, steps = finished
    lines = list(read_jsonl(run_dir.metrics))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, step in zip(lines, steps, strict=True):
        assert line["loss"] == step.loss
        assert line["lr"]["adapter"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * (step.step - 1) / STEPS)))
        assert line["terms"]["raw"] > 0
        assert line["grad_norm"].keys() == {"adapter", "rows"}


def test_tensorboard_has_every_curve(finished: tuple[RunDir, list[Step]]) -> None:
    run_dir, steps = finished
    events = EventAccumulator(str(run_dir.tensorboard))
    events.Reload()
    wanted = {"loss/total", "loss/raw", "lr/adapter", "lr/rows", "grad_norm/adapter", "grad_norm/rows"}
    wanted |= {"attention/grad_q", "attention/grad_k", "speed/images_per_second"}
    assert wanted <= set(events.Tags()["scalars"])
    points = events.Scalars("loss/total")
    assert [point.step for point in points] == [1, 2, 3, 4]
    assert [point.value for point in points] == pytest.approx([step.loss for step in steps])


def test_attention_gradients_are_the_mean_of_their_layers(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    """Recomputed here by name, from the gradients that the optimizer is about to use."""
    seen: list[dict[str, float]] = []

    class Recompute(Hook):
        def on_gradients(self, run: Run, event: Gradients) -> Mapping[str, float]:
            means: dict[str, float] = {}
            for letter in "qk":
                named = [p for n, p in run.components["adapter"] if f".to_{letter}." in n]
                gradients = torch.cat([p.grad.flatten() for p in named if p.grad is not None])
                means[f"grad_{letter}"] = gradients.abs().mean().item()
            seen.append(means)
            return {}

    args = tree(tiny_base, tiny_pictures, tmp_path, sample={"prompts": ["a"], "every": 0}, runtime={"steps": 2})
    with run.opened(args) as session:
        session.run.hooks = [*session.run.hooks, Recompute(session.run.hooks[0].context)]  # type: ignore[attr-defined]
        steps = list(session.steps())
    for step, means in zip(steps, seen, strict=True):
        assert step.extra["grad_q"] == pytest.approx(means["grad_q"], rel=1e-5)
        assert step.extra["grad_k"] == pytest.approx(means["grad_k"], rel=1e-5)
        assert 0 < step.extra["grad_q"] != step.extra["grad_k"]


def test_checkpoints_are_pruned(finished: tuple[RunDir, list[Step]], tiny_base: Path, tmp_path: Path) -> None:
    assert [step for step, _ in finished[0].complete_checkpoints()] == [2, 4]
    pictures = finished[0].root.parent / "pictures"
    short = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 2}
    with run.opened(tree(tiny_base, pictures, tmp_path, runtime=short, sample={"every": 0})) as session:
        list(session.steps())
    assert [step for step, _ in session.dir.complete_checkpoints()] == [2, 3]


def test_samples_and_grid(finished: tuple[RunDir, list[Step]]) -> None:
    run_dir, _ = finished
    rows = {folder.name: sorted(folder.glob("*.png")) for folder in run_dir.samples.iterdir() if folder.is_dir()}
    assert rows.keys() == {"before", "step_000003", "after_0.5", "after_1"}
    assert all(len(files) == 2 for files in rows.values())
    pixels = {name: Image.open(files[0]).tobytes() for name, files in rows.items()}
    assert len(set(pixels.values())) == 4, "training, and its strength, change the picture of the trigger"
    with Image.open(run_dir.grid) as grid:
        assert grid.height > 6 * 128, "two rows of training pictures and four of samples"


def test_a_resumed_run_repeats_no_line_and_no_point(
    finished: tuple[RunDir, list[Step]], tiny_base: Path, tmp_path: Path
) -> None:
    pictures = finished[0].root.parent / "pictures"
    with run.opened(tree(tiny_base, pictures, tmp_path)) as session:
        steps = session.steps()
        first = [next(steps) for _ in range(3)]  # the checkpoint is of step 2
        steps.close()
    assert [line["step"] for line in read_jsonl(session.dir.metrics)] == [1, 2, 3]
    with session.dir.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    with run.resumed(session.dir.root) as again:
        assert again.start == 2
        rest = list(again.steps())
    assert rest[0].loss == first[2].loss
    lines = list(read_jsonl(session.dir.metrics))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == [step.loss for step in finished[1]]
    events = EventAccumulator(str(session.dir.tensorboard))
    events.Reload()
    assert [point.step for point in events.Scalars("loss/total")] == [1, 2, 3, 4]
    env = json.loads(session.dir.env.read_text())
    assert [each["step"] for each in env["resumed"]] == [2]


def test_a_hook_of_ones_own(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from trainer.hooks import Hook\n"
        "class Mine(Hook):\n"
        "    def on_gradients(self, run, event):\n"
        "        return {'mine': float(event.update)}\n"
        "class NoHook: ...\n"
    )
    few = {"steps": 2}
    args = tree(tiny_base, tiny_pictures, tmp_path / "runs", runtime=few, hooks={"extra": [f"{mine}:Mine"]})
    with run.opened(args) as session:
        assert [step.extra["mine"] for step in session.steps()] == [0.0, 1.0]
    args = tree(tiny_base, tiny_pictures, tmp_path / "b", runtime=few, hooks={"extra": [f"{mine}:NoHook"]})
    with pytest.raises(ValueError, match="no subclass"), run.opened(args):
        pass
    with pytest.raises(ValueError, match="would import code"), run.opened(args, code=False):
        pass
    assert not (tmp_path / "b" / "run").exists()


def test_digest_moves_with_what_may_not_change(tmp_path: Path) -> None:
    args = tree(tmp_path, tmp_path, tmp_path)
    for name in fixed(args):
        assert not any(name == free or name.startswith(f"{free}.") for free in RESUMABLE)
    assert {"runtime.steps", "adapter.rank", "optim.rows.lr"} <= fixed(args).keys()
    other = args.model_copy(update={"sample": args.sample.model_copy(update={"every": 9})})
    assert digest(other) == digest(args)
    other = args.model_copy(update={"adapter": args.adapter.model_copy(update={"rank": 3})})
    assert digest(other) != digest(args)


def test_plain_lines_are_few_and_say_what_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    hook = Progress(Context(RunDir(tmp_path), tree(tmp_path, tmp_path, tmp_path), start=10))
    fake: Any = SimpleNamespace(steps=110)
    caplog.set_level(logging.INFO, "trainer.progress")
    hook.on_start(fake)
    for step in range(11, 111):
        now[0] += 1.0
        hook.on_step(fake, Step(step, 4, 0.5, {}, {}, {"adapter": 1e-3}, 1.0))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 8, "the first, one every 15 s, the last"
    assert lines[0] == "step 11/110  loss 0.5000  lr adapter 1.0e-03  4.0 images/s  1:39 left"
    assert lines[-1].startswith("step 110/110")
    assert lines[-1].endswith("0:00 left")
    assert progress.clock(7390) == "2:03:10"


def test_a_bar_with_the_time_left_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    hook = Progress(Context(RunDir(tmp_path), tree(tmp_path, tmp_path, tmp_path), start=2))
    fake: Any = SimpleNamespace(steps=5)
    hook.on_start(fake)
    for step in (3, 4, 5):
        time.sleep(0.11)  # tqdm draws ten times a second
        hook.on_step(fake, Step(step, 4, 0.25, {}, {}, {"adapter": 1e-3}, 1.0))
    drawn = terminal.getvalue().split("\r")
    assert any(re.search(r"3/5 \[\d\d:\d\d<\d\d:\d\d, .*loss 0\.2500\]", line) for line in drawn), drawn
    assert "5/5" in drawn[-1]
