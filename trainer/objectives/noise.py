"""The noise that a batch is mixed with."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_noise(like: Tensor, generator: torch.Generator, offset: float = 0.0) -> Tensor:
    """Standard normal noise like the latents [B, C, H, W], drawn on the CPU so that every device sees the same.

    With `offset` o, each picture and channel gets a constant of std o on top (crosslabs.org, "Diffusion with
    Offset Noise"): it lets a model that never trained at zero signal learn to move the mean brightness.
    """
    eps = torch.randn(like.shape, generator=generator)
    if offset:
        eps = eps + offset * torch.randn((*like.shape[:2], 1, 1), generator=generator)
    return eps.to(like)
