"""Frozen Linear layers with their weights as 8-bit integers, one scale for each output channel.

W is scale * codes, codes whole numbers in -127..127, so no entry is off by more than scale / 2, which is 1/254 of the
largest of its row. Each call makes the float weight anew, forward and for the gradient of the input, and nothing of it
is kept in between: what a layer holds is a byte for each weight.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.models.resting import give_back

log = logging.getLogger(__name__)

LEVELS = 127  # on each side of 0
SMALLEST = 2.0**-24  # of scales: what float16 can still say


def quantise(root: nn.Module) -> int:
    """Rounds the weights of `root`'s frozen Linear layers, for good; biases and all other layers stay.

    Returns:
        How many layers.
    """
    layers = [layer for layer in root.modules() if type(layer) is nn.Linear and not layer.weight.requires_grad]
    for layer in layers:
        _switch(layer)
    give_back(root.parameters())  # the other layers', which a fingerprint has read: no update needs them yet
    log.info("weights of %d Linear layers are held in 8 bits (model.quantise)", len(layers))
    return len(layers)


class QuantisedLinear(nn.Linear):
    """A frozen Linear of which `quantise` has rounded the weight. `weight` is a float tensor made when it is asked for.

    It has no parameter of that name: what would change the weight finds nothing to change, or is told so.
    """

    codes: nn.Parameter  # [o, i], int8
    scale: Tensor  # [o, 1], in the dtype that the weight had

    @property
    def weight(self) -> Tensor:
        return _float(self.codes.detach(), self.scale, self.scale.dtype)

    @weight.setter
    def weight(self, value: Tensor) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What PEFT assigns when it puts a layer back is the layer's own.

        Raises:
            ValueError: it is another.
        """
        if not torch.equal(value, self.weight):
            raise ValueError("a quantised weight cannot be changed")

    @property
    def dtype(self) -> torch.dtype:
        """The weight's, without making it."""
        return self.scale.dtype

    def input_gradient(self, grad: Tensor) -> Tensor:
        """[..., o] -> [..., i]: W^T grad."""
        return grad @ _float(self.codes, self.scale, grad.dtype)

    def forward(self, input: Tensor) -> Tensor:
        x, bias = input, cast(Tensor | None, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            bias = None if bias is None else bias.to(x.dtype)
        return cast(Tensor, _Linear.apply(x, self, bias))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return F.linear(x, _float(layer.codes, layer.scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.layer.input_gradient(grad), None, None


def _switch(layer: nn.Linear) -> None:
    weight = layer.weight.detach()
    codes, scale = _rounded(weight)
    give_back([weight])  # its file is mapped as long as any of its tensors is held
    del layer.weight
    own: Any = layer
    own.__class__ = QuantisedLinear
    own.codes = nn.Parameter(codes, requires_grad=False)
    own.register_buffer("scale", scale)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale). The scale is rounded to the weight's dtype first, so that codes make up for it."""
    wide = weight.float()
    scale = (wide.abs().amax(1, keepdim=True) / LEVELS).clamp_min(SMALLEST).to(weight.dtype)
    codes = (wide / scale.float()).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return codes, scale


def _float(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_(scale)
