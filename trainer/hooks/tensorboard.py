"""TensorBoard event files: loss, raw loss, lr, gradient norms, whatever other hooks add, pictures a second."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from trainer.hooks import Context, Hook
from trainer.loop import Run
from trainer.types import Step


def scalars(step: Step) -> dict[str, float]:
    """The tags of one step and their values."""
    tags = {"loss/total": step.loss, "speed/images_per_second": step.images / step.seconds}
    tags |= {f"loss/{name}": value for name, value in step.terms.items()}
    tags |= {f"lr/{component}": value for component, value in step.lr.items()}
    tags |= {f"grad_norm/{component}": value for component, value in step.grad_norm.items()}
    tags |= {f"attention/{name}": value for name, value in step.extra.items() if name in ("grad_q", "grad_k")}
    return tags | {f"extra/{name}": value for name, value in step.extra.items() if name not in ("grad_q", "grad_k")}


class TensorBoard(Hook):
    """A resumed run hides the points of updates that it repeats (purge_step)."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._writer: SummaryWriter | None = None

    def on_start(self, run: Run) -> None:
        purge = self.context.start + 1 if self.context.start else None
        self._writer = SummaryWriter(str(self.context.dir.tensorboard), purge_step=purge)

    def on_step(self, run: Run, step: Step) -> None:
        assert self._writer is not None  # on_start comes first
        for tag, value in scalars(step).items():
            self._writer.add_scalar(tag, value, step.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
