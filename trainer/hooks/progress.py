"""How far the run is: a bar with the time left on a terminal, and a few plain lines a minute in the log."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

from trainer.hooks import Context, Hook
from trainer.loop import Run
from trainer.types import Step

LINE_EVERY_S = 15.0

log = logging.getLogger("trainer.progress")


class Progress(Hook):
    """Lines go to the log always; the bar is drawn only where somebody can see it move."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._bar: Any = None
        self._last = self._began = 0.0

    def on_start(self, run: Run) -> None:
        self._began = time.monotonic()
        self._last = float("-inf")
        if sys.stderr.isatty() and self.context.start < run.steps:
            self._bar = tqdm(total=run.steps, initial=self.context.start, unit="step", desc="training", smoothing=0.05)

    def on_step(self, run: Run, step: Step) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {step.loss:.4f}", refresh=False)
            self._bar.update(1)
            if step.step == run.steps:
                self.close()
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_S or step.step == run.steps:
            self._last = now
            log.info("%s", self.line(step, run.steps, now - self._began))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def line(self, step: Step, steps: int, elapsed_s: float) -> str:
        """`step 40/300  loss 0.1234  lr adapter 1.0e-03  5.1 images/s  0:52 left`."""
        done = step.step - self.context.start
        left_s = elapsed_s / done * (steps - step.step)
        rates = " ".join(f"{component} {value:.1e}" for component, value in step.lr.items())
        speed = f"{step.images / step.seconds:.1f} images/s"
        return f"step {step.step}/{steps}  loss {step.loss:.4f}  lr {rates}  {speed}  {clock(left_s)} left"


def clock(seconds: float) -> str:
    """`0:52`, `12:05` or `2:03:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
