"""What acts inside a run: the table, the base class with a method for each event, and what each hook is made with.

`trainer.events` says when each event comes and what may be changed there, docs/hooks.md has them in one table. A hook's
failure is the run's failure, with its name on it: nothing here swallows an error.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from trainer import events
from trainer.args import Section, TrainArgs
from trainer.events import unheard
from trainer.loop import Run
from trainer.optim import evaluated
from trainer.rundir import RunDir
from trainer.types import Batch, Loss, Samples, Step

HOOKS: dict[str, str] = {
    "qk_gradients": "trainer.hooks.qk_gradients:QKGradients",
    "metrics": "trainer.hooks.metrics:Metrics",
    "tensorboard": "trainer.hooks.tensorboard:TensorBoard",
    "checkpoints": "trainer.hooks.checkpoints:Checkpoints",
    "samples": "trainer.hooks.samples:Samples",
    "progress": "trainer.hooks.progress:Progress",
    "ema": "trainer.hooks.ema:EMA",
    "grad_stats": "trainer.hooks.grad_stats:GradStats",
    "activations": "trainer.hooks.activations:Activations",
    "noise_jitter": "trainer.hooks.noise_jitter:NoiseJitter",
    "teacher": "trainer.hooks.teacher:Teacher",
    "collapse": "trainer.hooks.collapse:Collapse",
    "best": "trainer.hooks.best:Best",
}

Purpose = Literal["samples", "export"]


@dataclass(frozen=True)
class Context:
    """What a hook may know besides the loop's own Run."""

    dir: RunDir
    args: TrainArgs  # resolved
    start: int = 0  # updates that were done before this process
    pictures: tuple[str, ...] = field(default=())  # files of the dataset, in its order
    name: str = ""  # of this hook among those of the run


class Hook:
    """Does nothing at each event; a hook overrides what it needs, and only that is called.

    An answer of None changes nothing. A hook with options of its own declares them as `Options`, a Section, and is
    constructed with (context, options); others with (context) alone. Of several processes the first alone has hooks,
    but for those that say `everywhere`: they write nothing on the others, and are for what every process must do alike,
    such as changing a batch or gradients.
    """

    everywhere: ClassVar[bool] = False
    Options: ClassVar[type[Section] | None] = None
    own_errors: ClassVar[tuple[type[Exception], ...]] = ()  # whose message needs no word of the hook: they pass as is

    def __init__(self, context: Context) -> None:
        self.context = context

    @property
    def name(self) -> str:
        """As the args name it; messages and files of a checkpoint do too."""
        return self.context.name or type(self).__name__

    # --- before there is a run

    @unheard
    def on_model(self, event: events.ModelLoaded) -> None:
        """The base as it was loaded."""

    @unheard
    def on_attached(self, event: events.Attached) -> None:
        """The adapters are in it."""

    @unheard
    def on_start(self, run: Run) -> None:
        """Before the first update of this process; a resumed run has its state back."""

    # --- in each forward and backward

    @unheard
    def on_samples(self, run: Run, event: events.PicturesChosen) -> Samples | None:
        """Pictures, captions and bucket are chosen."""

    @unheard
    def on_batch(self, run: Run, event: events.BatchMade) -> Batch | None:
        """Text is encoded."""

    @unheard
    def on_timesteps(self, run: Run, event: events.TimestepsDrawn) -> Tensor | None:
        """Noise levels are drawn."""

    @unheard
    def on_noise(self, run: Run, event: events.NoiseDrawn) -> Tensor | None:
        """Noise is drawn."""

    @unheard
    def on_prediction(self, run: Run, event: events.PredictionMade) -> Tensor | None:
        """The model predicted."""

    @unheard
    def on_loss(self, run: Run, event: events.LossComputed) -> Loss | None:
        """The objective has its loss. A term that is added is logged when it is in `Loss.terms` of every micro."""

    # --- in each update

    @unheard
    def on_gradients(self, run: Run, event: events.Gradients) -> Mapping[str, float] | None:
        """Gradients are summed and not yet clipped; what is returned joins Step.extra."""

    @unheard
    def on_rates(self, run: Run, event: events.RatesSet) -> Mapping[str, float] | None:
        """Learning rates by component."""

    @unheard
    def on_before_update(self, run: Run, event: events.BeforeUpdate) -> None:
        """Parameters are about to move."""

    @unheard
    def on_after_update(self, run: Run, event: events.AfterUpdate) -> None:
        """Parameters have moved."""

    @unheard
    def on_step(self, run: Run, step: Step) -> None:
        """The figures of the update are known, gradients are gone."""

    @unheard
    def wants_stop(self, run: Run, step: Step) -> str | None:
        """Asked after on_step: why the run should end here, as at its last step. Needs `everywhere`."""

    # --- now and then

    @unheard
    def on_checkpoint(self, run: Run, event: events.CheckpointSaved) -> None:
        """A checkpoint is written."""

    @unheard
    def on_row(self, run: Run, event: events.RowDrawn) -> None:
        """A row of samples is drawn."""

    @unheard
    def on_stop(self, run: Run, event: events.Stopped) -> None:
        """A hook ended the run; on_end follows."""

    @unheard
    def on_end(self, run: Run) -> None:
        """After the last update."""

    # --- what is no event

    def state_dict(self) -> Mapping[str, Tensor]:
        """What a checkpoint must keep, for a resumed run to be the same run."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What state_dict gave; comes before on_start."""

    def presented(self, run: Run, purpose: Purpose) -> AbstractContextManager[None]:
        """Inside, the trained parameters hold what samples or the export should be made of. On the first process."""
        return nullcontext()

    def close(self) -> None:
        """The process leaves the run, also when it failed or was stopped. May come before on_start, and twice."""


@contextmanager
def presented(run: Run, purpose: Purpose) -> Generator[None]:
    """Inside, parameters are what the run's optimizers have found and its hooks want to have shown."""
    with ExitStack() as stack:
        stack.enter_context(evaluated(run.optimizers.values()))
        for hook in run.hooks:
            if isinstance(hook, Hook):
                stack.enter_context(hook.presented(run, purpose))
        yield
