"""A run under way: its steps, and what its first process makes of it after the last one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer import concepts, export, report
from trainer.args import TrainArgs
from trainer.dataset import Item, read_manifest
from trainer.hooks import presented
from trainer.hooks.checkpoints import Checkpoints, digest
from trainer.hooks.samples import Samples as SampleRows
from trainer.loop import Run, train
from trainer.optim import moved
from trainer.ranks import Ranks
from trainer.rundir import RunDir
from trainer.types import Step

log = logging.getLogger(__name__)


@dataclass
class Session:
    """One process of a run. `steps` does the work while it is iterated."""

    args: TrainArgs  # resolved
    dir: RunDir
    run: Run
    start: int  # updates done before
    here: Ranks
    marks: Mapping[tuple[str, str], str]  # of every trained tensor, before the first update

    def steps(self) -> Iterator[Step]:
        """Yields after each update, on every process; then the first makes the sample rows, exports and report.

        Raises:
            NeverMoved: after all that, if a trained tensor is what it was before the run.
        """
        done = self.start
        for step in train(self.run, self.start):
            done = step.step
            yield step
        if self.here.first:
            self._finish(done)
        self.here.barrier()
        moved.check(self.marks, self.run.components, moved.updates(self.run.optimizers, self.run.lr, done))

    def agreed(self, wish: bool) -> bool:
        """Whether any process wishes it: asked by all of them between the same two updates."""
        return any(self.here.gathered([wish]))

    def _finish(self, done: int) -> None:
        name, run = self.args.runtime.name, self.run
        with presented(run, "export"):
            files = export.export(self.dir.export, name, run.family, run.adapters, self.args, self._made(done))
        report.write(self.dir)
        log.info("done: %s", ", ".join(str(path) for path in [*files, self.dir.report]))

    def _made(self, done: int) -> export.Made:
        """What headers of exported files may say of this run."""
        runtime, items = self.args.runtime, [item for item in read_manifest(self.dir.dataset) if not item.regular]
        captions: dict[str, list[str]] = {}
        for item in items:
            captions.setdefault(concepts.trigger_of(item, self.args.data), []).append(item.caption)
        dataset = json.dumps(sorted((item.sha256, item.caption) for item in items))
        drawn = next((hook.after(self.run) for hook in self.run.hooks if isinstance(hook, SampleRows)), {})
        return export.Made(
            steps=done,
            batch=runtime.batch_size * runtime.accumulate * self.here.processes,
            captions=captions,
            buckets=Counter(item.bucket for item in items),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            digests={"args": digest(self.args), "dataset": hashlib.sha256(dataset.encode()).hexdigest()[:16]},
            samples=drawn,
            likeness=self._likeness(drawn, items),
        )

    def _likeness(self, drawn: Mapping[float, Sequence[Path]], items: Sequence[Item]) -> dict[float, export.Likeness]:
        """Of the sample rows, where there are several and the base has a CLIP, which knows no trigger."""
        folder = self.run.family.clip_folders.get("text_encoder")
        if folder is None or len(drawn) < 2:
            return {}
        prompts = [concepts.ordinary(prompt, self.args.data) for prompt in self.args.sample.prompts]
        tokenizer: Any = self.run.family.tokenizers["text_encoder"]
        return export.measure(folder, drawn, prompts, [Path(item.file) for item in items], tokenizer)

    def checkpoint(self, step: int) -> Path:
        """Saves where the run is, between two updates."""
        return next(hook for hook in self.run.hooks if isinstance(hook, Checkpoints)).save(self.run, step)
