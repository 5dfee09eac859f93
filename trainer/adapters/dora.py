"""DoRA (arXiv 2402.09353): LoRA turns the columns of a weight, and their lengths are trained on their own.

Over the input axis the files are exact in ComfyUI, Forge and AUTOMATIC1111. PEFT and diffusers know the output axis
only, so the layer is this room's own; there it is compared with PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.adapters.drops import Drops
from trainer.adapters.layered import expect, put
from trainer.adapters.lora import effective_alpha, rescaled
from trainer.adapters.stand_in import InPlace, StandIn
from trainer.adapters.targets import Target
from trainer.updates import LoraTensors, Update, difference, lengths


class Turned(StandIn):
    """W' = m V / |V|, V = W + scale B A, as an addition to what the base computes."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float, *, of_rows: bool) -> None:
        super().__init__(base)
        o, *rest = base.weight.shape
        flat = [1] * len(rest[1:])
        self.alpha = alpha  # effective: the scale is alpha / rank
        self.own["lora_A"] = nn.Parameter(torch.empty(rank, *rest, dtype=torch.float32))
        self.own["lora_B"] = nn.Parameter(torch.zeros(o, rank, *flat, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.own["lora_A"], a=math.sqrt(5))
        self.own["magnitude"] = nn.Parameter(lengths(base.weight.detach().float().cpu(), of_rows=of_rows))
        self.dropout = nn.Dropout(dropout)
        self.drops: Drops | None = None  # of ranks

    def update(self) -> LoraTensors:
        return LoraTensors(self.own["lora_A"], self.own["lora_B"], self.alpha, self.own["magnitude"])

    def changed(self, x: Tensor, strength: float) -> Tensor:
        base: Any = self.base_layer
        update = self.update()
        if self.drops is not None and self.training:  # of all pictures together: they share V and its lengths
            down = update.down
            update = replace(update, down=down * self.drops.kept(down, [down.shape[0], *[1] * (down.ndim - 1)]))
        change = difference(update, base.weight)
        change = change if strength == 1.0 else strength * change
        given = self.dropout(x.to(change.dtype))
        added = F.linear(given, change) if isinstance(base, nn.Linear) else base._conv_forward(given, change, None)
        result: Tensor = base(x)
        return (result + added).to(result.dtype)


class DoRA(InPlace):
    """DoRA on Linear and Conv2d layers."""

    def _made(self, base: nn.Module, target: Target) -> StandIn:
        assert isinstance(base, nn.Linear | nn.Conv2d)
        alpha = effective_alpha(target.alpha, target.rank, self.args.rank_stabilised)
        return Turned(base, target.rank, alpha, self.args.dropout, of_rows=self.args.axis == "output")

    def _tensors(self, layer: Any) -> dict[str, nn.Parameter]:
        return {
            "lora_A.weight": layer.own["lora_A"],
            "lora_B.weight": layer.own["lora_B"],
            "magnitude": layer.own["magnitude"],
        }

    def _drop_ranks(self, layer: Any, drops: Drops) -> None:
        layer.drops = drops

    def _update(self, layer: Any) -> Update:
        return layer.update()

    def lr_scale(self, name: str) -> float:
        """LoRA+ (arXiv 2402.12354): B learns faster than the rest."""
        return self.args.lora_plus if name.endswith("lora_B.weight") else 1.0

    def _copy(self, layer: Any, update: Update) -> None:
        given: LoraTensors = expect(update, LoraTensors, "dora")
        if given.magnitude is None:
            raise ValueError("it holds a LoRA, and adapter.kind is dora")
        put(layer.own["lora_A"], given.down)
        put(layer.own["lora_B"], given.up, rescaled(given, layer.alpha / given.down.shape[0]))
        put(layer.own["magnitude"], given.magnitude)
