"""A hook that says how much CPU time a process had used when its first step was done."""

from __future__ import annotations

import time
from pathlib import Path

from trainer.args import Section
from trainer.hooks import Context, Hook
from trainer.loop import Run
from trainer.types import Step


class FirstStep(Hook):
    """Writes CPU seconds since the process started to a file, once."""

    class Options(Section):
        file: str

    def __init__(self, context: Context, options: Options) -> None:
        super().__init__(context)
        self.file = Path(options.file)

    def on_step(self, run: Run, step: Step) -> None:
        if step.step == 1:
            self.file.write_text(f"{time.process_time():.3f}", encoding="utf-8")
