"""Full fine-tuning of chosen layers: each trains a difference to its weight (and bias), in float32.

As a difference it starts at 0, and weight decay pulls towards the base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainer.adapters.layered import expect, put
from trainer.adapters.stand_in import InPlace, StandIn
from trainer.adapters.targets import MATRICES, NORMS, Target
from trainer.updates import Difference, Update


class Changed(StandIn):
    """The base's layer with W + dW, b + db, summed in float32 and rounded to the base's precision."""

    def __init__(self, base: nn.Module, *, bias: bool) -> None:
        super().__init__(base)
        own = dict(base.named_parameters(recurse=False))
        for name in ("weight", "bias"):
            if name in own and (bias or name == "weight"):
                self.own[name] = nn.Parameter(torch.zeros_like(own[name], dtype=torch.float32))

    def changed(self, x: Tensor, strength: float) -> Tensor:
        weights: dict[str, Tensor] = {}
        for name, diff in self.own.items():
            base = self.base_layer.get_parameter(name)
            weights[name] = (base.float() + (diff if strength == 1.0 else strength * diff)).to(base.dtype)
        return functional_call(self.base_layer, weights, (x,))


class Full(InPlace):
    """Differences to weights of Linear, Conv2d and norm layers."""

    takes = (*MATRICES, *NORMS)
    ranked = False
    pace = 0.1

    def _made(self, base: nn.Module, target: Target) -> StandIn:
        return Changed(base, bias=self.args.bias)

    def _tensors(self, layer: Any) -> dict[str, nn.Parameter]:
        return {f"{name}_diff": diff for name, diff in layer.own.items()}

    def _update(self, layer: Any) -> Update:
        return Difference(layer.own["weight"], layer.own.get("bias", None))

    def _copy(self, layer: Any, update: Update) -> None:
        given: Difference = expect(update, Difference, "full")
        if (given.bias is None) != ("bias" not in layer.own):
            raise ValueError("one of the two trains biases, the other does not; see adapter.bias")
        put(layer.own["weight"], given.weight)
        if given.bias is not None:
            put(layer.own["bias"], given.bias)

    def _factors(self, layer: Any) -> list[nn.Parameter]:
        return [layer.own["weight"]]
