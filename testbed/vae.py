"""The autoencoder: 64 x 64 x 3 pictures to 16 x 16 x 4 latents and back, trained from nothing.

The first three latent channels are drawn towards the 4x4-averaged picture: latents that are
smooth and look like the picture are easier for a small denoiser than the free ones of a plain KL.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

ANCHOR_WEIGHT = 0.03
KL_WEIGHT = 1e-4
LATENT_NOISE = 0.08


def make_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )
    _unit_gain(vae)
    return vae


def _unit_gain(model: nn.Module) -> None:
    """std fan_in^-1/2 and quiet residual branches: torch's default stalls this autoencoder."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5 * (0.1 if name.endswith("conv2") else 1.0))
            nn.init.zeros_(module.bias)


def vae_loss(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error) of a batch [B, 3, H, W] in -1..1."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.sample()
    latents = latents + LATENT_NOISE * torch.randn_like(latents)
    out = vae.decode(latents).sample
    anchor = F.mse_loss(posterior.mean[:, :3], F.avg_pool2d(pixels, 4) * 1.6)
    free = posterior.mean[:, 3].square().mean()
    mse = F.mse_loss(out, pixels)
    loss = (
        F.l1_loss(out, pixels)
        + 2 * mse
        + ANCHOR_WEIGHT * (anchor + 0.1 * free)
        + KL_WEIGHT * posterior.kl().mean() / 256
    )
    return loss, mse.detach()
