"""What watches a run from inside its updates: the table, the base class, and what each hook is made with.

A hook is constructed with one `Context`. Its failure is the run's failure: nothing here swallows an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from trainer.args import TrainArgs
from trainer.loop import Run
from trainer.rundir import RunDir
from trainer.types import Step

HOOKS: dict[str, str] = {
    "qk_gradients": "trainer.hooks.qk_gradients:QKGradients",
    "metrics": "trainer.hooks.metrics:Metrics",
    "tensorboard": "trainer.hooks.tensorboard:TensorBoard",
    "checkpoints": "trainer.hooks.checkpoints:Checkpoints",
    "samples": "trainer.hooks.samples:Samples",
    "progress": "trainer.hooks.progress:Progress",
}


@dataclass(frozen=True)
class Context:
    """What a hook may know besides the loop's own Run."""

    dir: RunDir
    args: TrainArgs  # resolved
    start: int = 0  # updates that were done before this process
    pictures: tuple[str, ...] = field(default=())  # files of the dataset, in its order


class Hook:
    """Does nothing at each event; a hook overrides what it needs.

    Of several processes the first alone has hooks, but for those that say `everywhere`: they write nothing on the
    others, and are for what every process must do alike, such as changing gradients.
    """

    everywhere: ClassVar[bool] = False

    def __init__(self, context: Context) -> None:
        self.context = context

    def on_start(self, run: Run) -> None:
        """Before the first update of this process."""

    def on_gradients(self, run: Run, update: int) -> Mapping[str, float]:
        """Gradients are summed, over processes too, and not yet clipped; what is returned joins Step.extra.

        `update` counts from 0.
        """
        return {}

    def on_step(self, run: Run, step: Step) -> None:
        """After the optimizer moved."""

    def on_end(self, run: Run) -> None:
        """After the last update."""

    def close(self) -> None:
        """The process leaves the run, also when it failed or was stopped. May come before on_start, and twice."""
