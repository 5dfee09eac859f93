"""The denoiser: a UNet2DConditionModel of Stable Diffusion 1.5's kind, v-prediction, on 16 x 16 latents.

No attention at the top level: it costs half the time and buys nothing at this size.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from testbed.text import WIDTH

CHANNELS = (32, 64, 128)


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=tuple(c // 16 for c in CHANNELS),  # a count of heads, by an old slip of the name
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


BANDS = ((0, 150), (150, 350), (350, 850), (850, 1000))
PLAIN_SHARES = (0.08, 0.17, 0.60, 0.15)  # where a shape is decided
ALL_SHARES = (0.12, 0.28, 0.48, 0.12)  # more low noise, where fills are


def timesteps(rng: np.random.Generator, n: int, shares: tuple[float, ...]) -> Tensor:
    bands = [BANDS[i] for i in rng.choice(len(BANDS), n, p=shares)]
    return torch.tensor([int(rng.integers(lo, hi)) for lo, hi in bands])


def v_loss(
    unet: UNet2DConditionModel,
    alphas: Tensor,
    x0: Tensor,
    hidden: Tensor,
    t: Tensor,
    added: dict[str, Tensor] | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity; `alphas` is the cumulative product [1000].

    `added` is what SDXL's denoiser takes beside the hidden states: pooled text and time ids.
    """
    a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
    eps = torch.randn_like(x0)
    predicted = unet(a * x0 + s * eps, t, hidden, added_cond_kwargs=added).sample
    return (predicted - (a * eps - s * x0)).square().mean()
