"""An exponential moving average of what is trained, for samples, for the export, and in checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.args import EmaArgs
from trainer.events import AfterUpdate
from trainer.hooks import Context, Hook, Purpose
from trainer.hooks.trained import named, replaced
from trainer.loop import Run

log = logging.getLogger(__name__)


class EMA(Hook):
    """average = d average + (1 - d) parameter after each update, in float32 on the parameters' device.

    d is `decay`, but at update n (from 0) no more than (1 + n) / (w + n) with a warmup of w, and 0 at the first: what
    parameters were before training is no part of it, as in diffusers. Without warmup it is, as textbooks have it.
    """

    Options = EmaArgs

    def __init__(self, context: Context, options: EmaArgs) -> None:
        super().__init__(context)
        self.options = options
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_start(self, run: Run) -> None:
        there = dict(named(run))
        if not self._average:
            if self.context.start:
                log.warning("the checkpoint holds no average: it starts at step %d", self.context.start)
            self._average = {name: parameter.detach().float().clone() for name, parameter in there.items()}
        if self._average.keys() != there.keys():
            raise ValueError("the checkpoint's average is of other parameters than this run's")
        self._average = {name: average.to(there[name].device) for name, average in self._average.items()}

    @torch.no_grad()
    def on_after_update(self, run: Run, event: AfterUpdate) -> None:
        share = 1.0 - self.decay(event.update)
        for name, parameter in named(run):
            self._average[name].lerp_(parameter.detach().float(), share)

    def decay(self, update: int) -> float:
        """d after the update of that count, from 0."""
        most, warmup = self.options.decay or 0.0, self.options.warmup
        if not warmup:
            return most
        return min(most, (1 + update) / (warmup + update)) if update else 0.0

    @contextmanager
    def presented(self, run: Run, purpose: Purpose) -> Generator[None]:
        """The averages are in the parameters' place; afterwards those are what they were, to the bit."""
        wanted = {"samples": self.options.samples, "export": self.options.export}[purpose]
        if not wanted or not self._average:
            yield
            return
        with replaced(run, self._average):
            yield

    def state_dict(self) -> Mapping[str, Tensor]:
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._average = dict(state)
