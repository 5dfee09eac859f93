"""Checkpoints every so many updates and after the last one; older ones are deleted once a newer is complete."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer import checkpoint
from trainer.args import TrainArgs
from trainer.events import CheckpointSaved, Stopped
from trainer.hooks import Hook
from trainer.listeners import Listeners
from trainer.loop import Run
from trainer.types import Step

log = logging.getLogger(__name__)

# What a resumed run may change: it moves no weight of the result.
RESUMABLE = (
    "data.workers",
    "model.gradient_checkpointing",
    "model.attention",
    "sample",
    "hooks.tensorboard",
    "hooks.extra",
    "hooks.grad_stats",
    "hooks.activations",
    "hooks.collapse",
    "export",
    "runtime.checkpoint_every",
    "runtime.keep_checkpoints",
    "runtime.device",
    "runtime.threads",
)


def fixed(args: TrainArgs) -> dict[str, object]:
    """The options that every process of one run must share, by dotted name."""
    flat: dict[str, object] = {}
    pending: list[tuple[str, object]] = list(args.model_dump(mode="json").items())
    while pending:
        name, value = pending.pop()
        if name in RESUMABLE:
            continue
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", item) for key, item in value.items()]
        else:
            flat[name] = value
    return dict(sorted(flat.items()))


def digest(args: TrainArgs) -> str:
    """16 hex digits over `fixed`: a checkpoint is only continued by a run of the same."""
    return hashlib.sha256(json.dumps(fixed(args)).encode()).hexdigest()[:16]


class Drifted(RuntimeError):  # noqa: N818  it names what happened
    """Processes that should train the same parameters hold different ones."""


class Checkpoints(Hook):
    """Also what an interrupted run calls to save where it is. The first process writes, once all have proved alike."""

    everywhere = True
    own_errors = (checkpoint.CheckpointError, Drifted, OSError)

    def on_stop(self, run: Run, event: Stopped) -> None:
        self.save(run, event.step)

    def on_step(self, run: Run, step: Step) -> None:
        if step.step % self.context.args.runtime.checkpoint_every == 0 or step.step == run.steps:
            self.save(run, step.step)

    def save(self, run: Run, step: int) -> Path:
        """Writes the checkpoint of `step` finished updates, unless it is there already, and prunes.

        Raises:
            Drifted: processes hold different parameters; nothing is written.
        """
        path = self.context.dir.checkpoint(step)
        if run.engine.processes > 1:
            _check_alike(run, step)
        if run.engine.rank > 0:
            return path
        if not path.exists():
            keepers = [*(hook for hook in run.hooks if isinstance(hook, Hook)), run.engine]
            checkpoint.save(path, step, run.adapters, run.optimizers, digest(self.context.args), keepers)
            log.info("checkpoint %s", path)
            Listeners(run, run.hooks)(CheckpointSaved(step, path))
        checkpoint.prune(self.context.dir, self.context.args.runtime.keep_checkpoints)
        return path


def _check_alike(run: Run, step: int) -> None:
    mark = hashlib.sha256()
    for named in run.components.values():
        for _, parameter in named:
            mark.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    marks: Sequence[str] = run.engine.gathered([mark.hexdigest()])
    other = [rank for rank, found in enumerate(marks) if found != marks[0]]
    if other:
        raise Drifted(
            f"at step {step} rank {other[0]} of {len(marks)} holds other parameters than rank 0, and they must be "
            "equal to the last bit; no checkpoint was made of it. A hook that changes gradients or parameters must "
            "say `everywhere`; go on from the last checkpoint with --resume"
        )
