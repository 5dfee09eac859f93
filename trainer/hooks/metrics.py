"""metrics.jsonl: one Step a line, flushed as it happens; stopped.json where a hook ended the run."""

from __future__ import annotations

import json
from dataclasses import asdict

from trainer.events import Stopped
from trainer.hooks import Hook
from trainer.loop import Run
from trainer.rundir import atomic_write, read_jsonl
from trainer.types import Step


class Metrics(Hook):
    """Appends. A resumed run first drops the lines of updates that it is going to repeat."""

    own_errors = (OSError,)

    def on_start(self, run: Run) -> None:
        path = self.context.dir.metrics
        if path.exists():
            kept = [line for line in read_jsonl(path) if line["step"] <= self.context.start]
            atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))

        if self.context.start < run.steps:
            self.context.dir.stopped.unlink(missing_ok=True)  # it goes on

    def on_stop(self, run: Run, event: Stopped) -> None:
        found = {"step": event.step, "of": run.steps, "by": event.by, "reason": event.reason}
        atomic_write(self.context.dir.stopped, json.dumps(found, indent=2) + "\n")

    def on_step(self, run: Run, step: Step) -> None:
        with self.context.dir.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(step)) + "\n")
