"""Noise that is a little weaker or stronger than its timestep says: an example of a hook that changes noise."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.args import NoiseJitterArgs
from trainer.events import NoiseDrawn
from trainer.hooks import Context, Hook
from trainer.loop import Run
from trainer.seed import derive


class NoiseJitter(Hook):
    """Multiplies the noise of each picture by a factor drawn evenly from 1 - strength .. 1 + strength.

    The target is made of the noise that the picture was given, so the model learns to judge a level by the picture too.
    """

    everywhere = True
    Options = NoiseJitterArgs

    def __init__(self, context: Context, options: NoiseJitterArgs) -> None:
        super().__init__(context)
        self.options = options

    def on_noise(self, run: Run, event: NoiseDrawn) -> Tensor:
        generator = torch.Generator().manual_seed(derive(run.seed, "noise_jitter", event.update, event.turn))
        even = 2.0 * torch.rand((len(event.eps), 1, 1, 1), generator=generator) - 1.0
        return event.eps * (1.0 + self.options.strength * even).to(event.eps)
