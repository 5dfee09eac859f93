"""What a run would do, said before it: its pictures and their problems, its steps, and the time and memory they take.

It is measured, not guessed: everything is done as in the run up to a few updates on its largest pictures, in a folder
that is gone afterwards.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer.args import TrainArgs
from trainer.loop import Run, train
from trainer.optim import assigned, described
from trainer.run import Session, opened

_UPDATES = 3  # the first is slower than the rest and does not count


@dataclass(frozen=True)
class Rehearsal:
    """Sentences: `facts` for a person to check, `problems` that may spoil the result."""

    facts: tuple[str, ...]
    problems: tuple[str, ...]


def rehearse(args: TrainArgs, *, code: bool = True) -> Rehearsal:
    """Does what a run does before it trains and `_UPDATES` of its updates; leaves nothing behind.

    Raises:
        RunError, BaseModelError, PreprocessError, PartError, DatasetError: as `run.opened`.
    """
    with tempfile.TemporaryDirectory(prefix="tempera-") as scratch:
        runtime = args.runtime.model_copy(update={"out": scratch})
        hooks = args.hooks.model_copy(update={"tensorboard": False})
        began = time.perf_counter()
        with opened(args.model_copy(update={"runtime": runtime, "hooks": hooks}), code=code) as session:
            before = time.perf_counter() - began
            survey: dict[str, Any] = json.loads(session.dir.survey.read_text(encoding="utf-8"))
            step = _seconds(session.run)
            rules = session.args.optim.rules
            obeyed = described(rules, assigned(rules, session.run.components))
            return Rehearsal((*survey["facts"], *_cost(session, before, step), *obeyed), tuple(survey["problems"]))


def _cost(session: Session, before: float, step: float) -> Sequence[str]:
    runtime, steps = session.args.runtime, session.run.steps
    pictures = runtime.batch_size * runtime.accumulate
    peak = _peak(session.run.engine.device)
    return (
        f"{steps} steps of {pictures} pictures",
        f"about {_duration(before)} to prepare, {step:.3g} s a step and {_duration(steps * step)} for all steps; "
        "samples come on top",
        *([f"{peak / 2**20:.0f} MiB of memory"] if peak else []),
    )


def _seconds(run: Run) -> float:
    """Of one update on the largest bucket, where a run needs most; measured without hooks, which may draw samples."""
    largest = max(range(min(run.steps, 200)), key=lambda update: _size(run, update))
    short = replace(run, hooks=[], steps=largest + _UPDATES)
    times = [step.seconds for step in train(short, largest)]
    return min(times[1:])


def _size(run: Run, update: int) -> int:
    return run.dataset.micro(update * run.accumulate).latents.numel()


def _peak(device: torch.device) -> int:
    """Bytes; of the GPU where there is one, else of this process; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
