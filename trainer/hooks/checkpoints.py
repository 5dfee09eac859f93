"""Checkpoints every so many updates and after the last one; older ones are deleted once a newer is complete."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from trainer import checkpoint
from trainer.args import TrainArgs
from trainer.hooks import Hook
from trainer.loop import Run
from trainer.types import Step

log = logging.getLogger(__name__)

# What a resumed run may change: it moves no weight of the result.
RESUMABLE = (
    "data.workers",
    "sample",
    "hooks",
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


class Checkpoints(Hook):
    """Also what an interrupted run calls to save where it is."""

    def on_step(self, run: Run, step: Step) -> None:
        if step.step % self.context.args.runtime.checkpoint_every == 0 or step.step == run.steps:
            self.save(run, step.step)

    def save(self, run: Run, step: int) -> Path:
        """Writes the checkpoint of `step` finished updates, unless it is there already, and prunes."""
        path = self.context.dir.checkpoint(step)
        if not path.exists():
            checkpoint.save(path, step, run.adapters, run.optimizers, digest(self.context.args))
            log.info("checkpoint %s", path)
        checkpoint.prune(self.context.dir, self.context.args.runtime.keep_checkpoints)
        return path
