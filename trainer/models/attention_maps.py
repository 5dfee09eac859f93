"""Where in a picture a prompt's tokens are looked at: maps of a UNet's cross-attention, with gradients.

A map is of probabilities: softmax(scale q k^T) over all tokens of a prompt, of which those asked for are added up, mean
over heads and layers. Whatever code computes the attention itself never shows them, so they are computed again from
each layer's queries and keys, a layer at a time, in the forward pass and once more in the backward one. What is held
at once is one layer's B x heads x h w x L numbers, and each layer's queries and keys until the backward pass, which
attention keeps anyway unless the UNet's gradients are checkpointed.

Shapes: B pictures, H W latent height and width, h w those of a map, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.types import BaseModelError


def cross_layers(unet: Any) -> dict[int, list[Attention]]:
    """Cell -> the layers of cross-attention that see the picture at H / cell x W / cell, in the UNet's order."""
    deepest = len(unet.config.block_out_channels) - 1
    found: dict[int, list[Attention]] = {}
    for path, layer in unet.named_modules():
        if isinstance(layer, Attention) and layer.is_cross_attention:
            found.setdefault(2 ** _depth(path, deepest), []).append(layer)
    return found


def _depth(path: str, deepest: int) -> int:
    """How often the picture was halved where the layer is: down_blocks.1 comes after one halving."""
    block, number, *_ = path.split(".")
    if block == "mid_block":
        return deepest
    return int(number) if block == "down_blocks" else deepest - int(number)


@contextmanager
def watched(unet: nn.Module, places: Tensor, cell: int) -> Generator[Callable[[], Tensor]]:
    """Inside, what the UNet looks at is kept. What is yielded gives the maps [B, h, w] of the last prediction.

    Args:
        places: [B, L] bool, the tokens whose maps are added up; a prompt without one has a map of zeros.
        cell: latents that a side of a map's element stands for: h = H / cell.

    Raises:
        BaseModelError: no layer of cross-attention has this resolution.
    """
    by_cell = cross_layers(unet)
    if cell not in by_cell:
        raise BaseModelError(
            f"the base has no cross-attention over cells of {cell} x {cell} latents; it has it over cells of "
            f"{', '.join(map(str, sorted(by_cell)))}"
        )
    layers = by_cell[cell]
    sides = [0, 0]
    seen: dict[tuple[int, str], Tensor] = {}  # nothing is computed here: a checkpointed block would compute it again

    def begin(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        sides[:] = given[0].shape[-2:]

    def keep(at: tuple[int, str]) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _given, made: seen.update({at: made})

    def maps() -> Tensor:
        there = places.to(seen[0, "q"].device)
        each = [_map(seen[i, "q"], seen[i, "k"], there, layer) for i, layer in enumerate(layers)]
        return torch.stack(each).mean(0).unflatten(1, (sides[0] // cell, sides[1] // cell))

    with ExitStack() as hooks:
        hooks.callback(unet.register_forward_pre_hook(begin).remove)
        for i, layer in enumerate(layers):
            for name in ("q", "k"):
                hooks.callback(layer.get_submodule(f"to_{name}").register_forward_hook(keep((i, name))).remove)
        yield maps


def _map(query: Tensor, key: Tensor, places: Tensor, layer: Attention) -> Tensor:
    """[B, h w] float32: how much each place looks at the chosen tokens."""
    result: Any = checkpoint(
        _looked_at, query, key, places, layer.heads, layer.scale, use_reentrant=False, preserve_rng_state=False
    )
    return result


def _looked_at(query: Tensor, key: Tensor, places: Tensor, heads: int, scale: float) -> Tensor:
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2).float() for x in (query, key))
    with torch.autocast(query.device.type, enabled=False):
        shares = (scale * q @ k.transpose(-1, -2)).softmax(-1).mean(1)  # [B, h w, L]
        return (shares * places.unsqueeze(1)).sum(-1)
