"""LoRA on frozen linear layers as one node of the graph: fewer operators, casts and copies than in PEFT's own forward.

    y = W x + b + s B A x;    with g = dL/dy:  dB = s g (A x)^T,  dA = s B^T g x^T,  dx = W^T g + s A^T B^T g

in the precision of x, where PEFT goes through float32. The layers stay PEFT's: only the forward pass of the usual case
is another, and every other case is left to PEFT.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedLinear(Linear):
    """PEFT's layer without dropout, whose forward pass is `_Fused` where that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self._usual()
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, down, up = self.base_layer, self.lora_A[name], self.lora_B[name]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        elif x.dtype != down.weight.dtype:  # PEFT widens it
            return super().forward(x)
        plain = type(base) is nn.Linear
        if x.dtype != (base.weight.dtype if plain else base.dtype) or any(map(_hooked, (base, down, up))):
            return super().forward(x)
        weight = base.weight if plain else None
        return cast(Tensor, _Fused.apply(x, weight, down.weight, up.weight, base, self.scaling[name]))

    def _usual(self) -> str | None:
        """The adapter at work, if it is the only one, on a frozen layer that tells its input's gradient."""
        base = self.base_layer
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or self.lora_variant:
            return None
        frozen = not any(parameter.requires_grad for parameter in base.parameters(recurse=False))
        known = type(base) is nn.Linear and type(base.weight) is nn.Parameter
        return self.active_adapters[0] if frozen and (known or hasattr(base, "input_gradient")) else None


def fuse(layer: nn.Module) -> None:
    """Gives PEFT's LoRA of a linear layer the forward pass of `FusedLinear`; other layers stay as they are."""
    if type(layer) is Linear:
        layer.__class__ = FusedLinear


def _hooked(module: nn.Module) -> bool:
    """Whether somebody listens to the module, which the node does not call."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


class _Fused(torch.autograd.Function):
    """x [..., in], weight [out, in] (frozen), down A [rank, in], up B [out, rank] -> y [..., out].

    A base that is no plain layer keeps its weight to itself: None is given, and `base.input_gradient` asked.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, down: Tensor, up: Tensor, base: Any, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = (rows @ down.to(x.dtype).t()).mul_(scale)
        out: Tensor = base(x)
        out.view(-1, out.shape[-1]).addmm_(inner, up.to(x.dtype).t())
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.base, ctx.scale = base, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator hides the names of its arguments
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight: Tensor | None
        rows, inner, weight, down, up = ctx.saved_tensors
        grad = grad_outputs[0]
        flat = grad.reshape(-1, grad.shape[-1])
        along = (flat @ up.to(flat.dtype)).mul_(ctx.scale)
        d_x, d_down, d_up = None, None, None
        if ctx.needs_input_grad[2]:
            d_down = (along.t() @ rows).to(down.dtype)
        if ctx.needs_input_grad[3]:
            d_up = (flat.t() @ inner).to(up.dtype)
        if ctx.needs_input_grad[0]:
            d_x = cast(Tensor, ctx.base.input_gradient(grad) if weight is None else grad @ weight)
            d_x.view(-1, d_x.shape[-1]).addmm_(along, down.to(flat.dtype))
        return d_x, None, d_down, d_up, None, None
