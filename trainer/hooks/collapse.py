"""Ends a run that went wrong: its loss rose and stayed high, or its samples went flat or alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.args import CollapseArgs
from trainer.events import RowDrawn
from trainer.hooks import Context, Hook
from trainer.loop import Run
from trainer.registry import PartError
from trainer.types import Step


class Look(NamedTuple):
    """What is measured of a row of samples."""

    contrast: float  # mean over pictures of the standard deviation of their grey values, 0..255
    difference: float | None  # mean over pairs of pictures of their root mean square difference; None of fewer than two


class Collapse(Hook):
    """What is measured, and compared:

    - `loss`: the median over the last `window` steps of the raw term (of the loss where there is none). Too much is
      `loss` times the lowest such median of the run, or more.
    - `samples`: of each row drawn during training, the contrast and the difference of `Look`. Too little is less than
      `samples` times what the row before training had.
    """

    everywhere = True
    Options = CollapseArgs

    def __init__(self, context: Context, options: CollapseArgs) -> None:
        super().__init__(context)
        if options.samples is not None and not context.args.sample.every:
            raise PartError("hooks.collapse.samples looks at rows drawn during training: set sample.every above 0")
        self.options = options
        self._losses: list[float] = []
        self._lowest = float("inf")
        self._verdict: str | None = None

    def on_row(self, run: Run, event: RowDrawn) -> None:
        if self.options.samples is not None and event.row.startswith("step_"):
            self._verdict = compared(look(event.files), look(event.before), self.options.samples)

    def wants_stop(self, run: Run, step: Step) -> str | None:
        verdict, self._verdict = self._verdict, None
        return verdict or self._loss(step)

    def _loss(self, step: Step) -> str | None:
        most, window = self.options.loss, self.options.window
        if most is None:
            return None
        self._losses = [*self._losses, step.terms.get("raw", step.loss)][-window:]
        if len(self._losses) < window:
            return None
        now = median(self._losses)
        self._lowest = min(self._lowest, now)
        if now < most * self._lowest:
            return None
        return f"the median raw loss of the last {window} steps is {now:.4g}, and was {self._lowest:.4g}"

    def state_dict(self) -> Mapping[str, Tensor]:
        values = {"losses": self._losses, "lowest": [self._lowest]}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._losses, (self._lowest,) = state["losses"].tolist(), state["lowest"].tolist()


def look(files: Sequence[Path]) -> Look:
    """Measures pictures of one size."""
    pictures = [_pixels(file) for file in files]
    contrast = mean(float((pixels @ np.array([0.299, 0.587, 0.114])).std()) for pixels in pictures)
    pairs = [float(np.sqrt(((a - b) ** 2).mean())) for a, b in combinations(pictures, 2)]
    return Look(contrast, mean(pairs) if pairs else None)


def compared(now: Look, before: Look, least: float) -> str | None:
    """Why the pictures are too flat or too much alike, or None."""
    if now.contrast < least * before.contrast:
        return f"samples went flat: their contrast is {now.contrast:.1f}, and was {before.contrast:.1f} before training"
    if now.difference is None or before.difference is None or now.difference >= least * before.difference:
        return None
    return (
        f"samples of different prompts became alike: they differ by {now.difference:.1f}, and did by "
        f"{before.difference:.1f} before training"
    )


def _pixels(file: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.float64)
