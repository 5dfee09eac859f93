"""What is drawn beside a batch: the noise that it is mixed with, and noise on its input and its condition.

All is drawn on the CPU, so that every device sees the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from trainer.types import Cond


def draw_noise(
    like: Tensor, generator: torch.Generator, offset: float = 0.0, *, pyramid: float = 0.0, shape: Tensor | None = None
) -> Tensor:
    """Noise of unit variance like the latents [B, C, H, W]; standard normal where no option is given.

    Args:
        offset: each picture and channel gets a constant of this std on top (crosslabs.org, "Diffusion with Offset
            Noise"): it lets a model that never trained at zero signal learn to move the mean brightness.
        pyramid: noise of half the size, a quarter and so on down to one latent is added, times pyramid^k, and the sum
            scaled back to unit std in each picture (wandb.ai/johnowhitaker/multires_noise, there with random sizes).
        shape: [B], `gamma_shape`, and noise is drawn from that gamma distribution.
    """
    eps = torch.randn(like.shape, generator=generator) if shape is None else _gamma(like.shape, shape, generator)
    if pyramid:
        eps = _with_coarser(eps, generator, pyramid)
    if offset:
        eps = eps + offset * torch.randn((*like.shape[:2], 1, 1), generator=generator)
    return eps.to(like)


def gamma_shape(snr: Tensor, theta: float) -> Tensor:
    """k_t [B] float64 of denoising diffusion gamma models (arXiv 2110.05948): (1 - ac) / (ac theta_0^2).

    There x_t = sqrt(ac) x0 + g - E g with g of shape k_t and scale sqrt(ac) theta_0, so that eps is (G - k) / sqrt(k)
    for G of shape k_t and scale 1. It ends in normal noise as k grows.
    """
    return (1.0 / (snr.double() * theta**2)).clamp(max=1e9)


def perturbed(eps: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The noise that the input is mixed with where the target keeps `eps`: eps + strength N (arXiv 2301.11706)."""
    if not strength:
        return eps
    return eps + strength * torch.randn(eps.shape, generator=generator).to(eps)


def noisy_condition(cond: Cond, strength: float, generator: torch.Generator) -> Cond:
    """The condition plus strength times its own std, in each picture, times N; what is pooled likewise."""
    if not strength:
        return cond
    hidden = _jittered(cond.hidden, strength, generator)
    return replace(
        cond, hidden=hidden, pooled=None if cond.pooled is None else _jittered(cond.pooled, strength, generator)
    )


def _jittered(text: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    std = text.detach().flatten(1).std(1).reshape(-1, *([1] * (text.ndim - 1)))
    return text + strength * std * torch.randn(text.shape, generator=generator).to(text)


def _gamma(size: torch.Size, shape: Tensor, generator: torch.Generator) -> Tensor:
    k = shape.cpu().double().reshape(-1, *([1] * (len(size) - 1)))
    drawn = torch._standard_gamma(k.expand(size).contiguous(), generator=generator)  # pyright: ignore
    return ((drawn - k) / k.sqrt()).float()


def _with_coarser(eps: Tensor, generator: torch.Generator, discount: float) -> Tensor:
    height, width = eps.shape[-2:]
    k = 0
    while height > 1 and width > 1:
        height, width, k = height // 2, width // 2, k + 1
        coarse = torch.randn((*eps.shape[:2], height, width), generator=generator)
        eps = eps + discount**k * nn.functional.interpolate(coarse, eps.shape[-2:], mode="bilinear")
    return eps / eps.flatten(1).std(1).reshape(-1, 1, 1, 1)
