"""Which code computes a UNet's attention: torch's own, or xformers' where it can run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor
from torch import Tensor

from trainer.types import BaseModelError

TOLERANCE = 2e-2  # of values about 1; half precision differs by less


def use_xformers(unet: Any) -> None:
    """Has every attention layer computed by xformers, once a trial on this device has come out right.

    Raises:
        BaseModelError: it is not installed, cannot run here, or computes something else than torch.
    """
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore
    except (ImportError, OSError) as error:
        raise BaseModelError(
            "model.attention is xformers, which is not installed or cannot be loaded here: take sdpa, or "
            "pip install xformers==0.0.35 (Linux or Windows on x86_64, with a GPU)"
        ) from error
    compute: Any = memory_efficient_attention
    for width in sorted({layer.inner_dim // layer.heads for layer in unet.modules() if isinstance(layer, Attention)}):
        why = _trouble(compute, width, unet.device, unet.dtype)
        if why:
            raise BaseModelError(
                f"model.attention is xformers, which cannot serve heads of width {width} in {unet.dtype} on "
                f"{unet.device} ({why}); take sdpa, which is as fast on current GPUs"
            )
    unet.set_attn_processor(XFormersAttnProcessor())


def _trouble(compute: Any, width: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """What goes wrong in a small attention, forward and backward; None where it is as torch's."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 8, width, generator=generator).to(device, dtype) for _ in range(3)]
    query, key, value = (tensor.requires_grad_() for tensor in drawn)
    try:
        out: Tensor = compute(query, key, value)
        (mine,) = torch.autograd.grad(out.sum(), query)
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error).strip().partition("\n")[0].rstrip(" :") or type(error).__name__
    expected = F.scaled_dot_product_attention(query, key, value)
    (theirs,) = torch.autograd.grad(expected.sum(), query)
    far = max((out - expected).abs().max().item(), (mine - theirs).abs().max().item())
    return None if far < TOLERANCE else f"its result is off by {far:.2g}"
