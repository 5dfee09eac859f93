"""How far the run is: a bar with the time left on a terminal, and a few plain lines a minute in the log."""

from __future__ import annotations

from trainer.hooks import Context, Hook
from trainer.loop import Run
from trainer.progress import Progress as Meter
from trainer.progress import clock
from trainer.types import Step

LINE_EVERY_S = 15.0


class Progress(Hook):
    """Lines go to the log always; the bar is drawn only where somebody can see it move."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._meter: Meter | None = None

    def on_start(self, run: Run) -> None:
        self._meter = Meter("training", run.steps, "step", done=self.context.start, after_s=0.0, every_s=LINE_EVERY_S)

    def on_step(self, run: Run, step: Step) -> None:
        assert self._meter is not None
        meter = self._meter
        meter.advance(note=f"loss {step.loss:.4f}", line=lambda: self.line(step, run.steps, meter.elapsed_s))

    def close(self) -> None:
        if self._meter is not None:
            self._meter.close()

    def line(self, step: Step, steps: int, elapsed_s: float) -> str:
        """`step 40/300  loss 0.1234  lr adapter 1.0e-03  5.1 images/s  0:52 left`."""
        done = step.step - self.context.start
        left_s = elapsed_s / done * (steps - step.step)
        rates = " ".join(f"{component} {value:.1e}" for component, value in step.lr.items())
        speed = f"{step.images / step.seconds:.1f} images/s"
        return f"step {step.step}/{steps}  loss {step.loss:.4f}  lr {rates}  {speed}  {clock(left_s)} left"
