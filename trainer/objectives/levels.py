"""Noise levels: which timesteps are trained, and how much each counts."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.path import NoisePath


def draw_timesteps(count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """[count] int64 on the CPU, uniform in low..high-1."""
    return torch.randint(low, high, (count,), generator=generator)


def min_snr_weight(path: NoisePath, t: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights [B] (arXiv 2303.09556), in the form that the path's target asks for.

    The paper weights the x0 error by min(snr, gamma). An eps error is an x0 error times snr and a v error one
    times snr + 1, hence the divisors. At snr 0 the eps form is taken at its limit, 1.
    """
    snr = path.snr(t)
    if path.target == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    return snr.clamp(max=gamma) / (snr + 1.0)
