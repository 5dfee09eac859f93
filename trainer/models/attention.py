"""Which code computes a UNet's attention: torch's own, plain products on a CPU, or xformers' where it can run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor

from trainer.types import BaseModelError

TOLERANCE = 2e-2  # of values about 1; half precision differs by less
PAIRS = 2**20  # of tokens, N x M, from which torch's kernel is as fast; products hold one number a pair and head


def use_products(unet: Any) -> None:
    """Has attention computed by `Products`, in the layers of the plain form that a UNet's blocks have."""
    layers = {path: layer for path, layer in unet.named_modules() if isinstance(layer, Attention)}
    own = {path: Products() if _plain(layer) else layer.processor for path, layer in layers.items()}
    unet.set_attn_processor({f"{path}.processor": processor for path, processor in own.items()})


def _plain(layer: Attention) -> bool:
    """Whether nothing is normed within the layer, and nothing done with its output."""
    within = (layer.spatial_norm, layer.group_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
    return all(norm is None for norm in within) and not layer.residual_connection and layer.rescale_output_factor == 1


class Products:
    """softmax(q k^T / sqrt(width)) v as two products and a softmax, in bfloat16.

    A CPU's fused kernel goes through float32 there, which takes up to four times as long where there are few tokens on
    one side. Here the softmax, too, is rounded to bfloat16: errors of 0.5 % where the kernel's are 0.2 %. Other
    precisions, masks and PAIRS or more are left to torch.
    """

    def __init__(self) -> None:
        self._torch = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, N, C], encoder_hidden_states [B, M, E] -> [B, N, C]; names are diffusers'."""
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
        many = hidden_states.shape[1] * seen.shape[1] >= PAIRS
        if attention_mask is not None or many or precision != torch.bfloat16 or hidden_states.device.type != "cpu":
            return self._torch(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        layers: Any = attn  # diffusers says little of their types
        query, key, value = (
            _by_head(layer(given), attn.heads)
            for layer, given in ((layers.to_q, hidden_states), (layers.to_k, seen), (layers.to_v, seen))
        )
        weights = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2)).softmax(-1)
        mixed = torch.bmm(weights, value).unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2)
        return layers.to_out[1](layers.to_out[0](mixed))


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """[B, N, heads * width] -> [B * heads, N, width]."""
    return tensor.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)


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
