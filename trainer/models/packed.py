"""Frozen layers with their weights in oneDNN's own order, made once: a CPU otherwise orders them anew at each call.

It pays for large layers on small maps, where ordering the weights costs more than the product with them: forward, and
with the weights transposed for the gradient of the input. It costs memory for two more copies of the weights, after
which the plain ones go back to their file (`resting.give_back`). The operators are private ones of torch, so they are
tried out against the plain path before anything is packed, and a layer whose weight is not the one that was packed
(trained, replaced, changed, in another dtype) computes as ever.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, cast

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.models.resting import give_back
from trainer.types import BaseModelError

log = logging.getLogger(__name__)

SMALLEST = 200_000_000  # weights of a model below which `auto` leaves it as it is: nothing to win
SHARE = 0.5  # of the machine's memory that weights and both copies may take for `auto`
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of values about 1, in the trial


def pack(root: nn.Module, mode: Literal["auto", "on", "off"], device: torch.device) -> int:
    """Has frozen Linear and Conv2d layers of `root` compute with packed weights, from their first call on.

    Returns:
        How many layers.

    Raises:
        BaseModelError: `mode` is on, and it cannot be had here.
    """
    if mode == "off":
        return 0
    layers = [layer for layer in root.modules() if type(layer) in (nn.Linear, nn.Conv2d) and _takes(layer)]
    dtype = next(root.parameters()).dtype
    why = _unfit(layers, device) if mode == "auto" else None
    if why is None:
        why = _trouble(dtype) if device.type == "cpu" else f"it is for CPUs, and the device is {device}"
    if why is not None:
        if mode == "on":
            raise BaseModelError(f"model.packed is on, which cannot be had here ({why}); take auto or off")
        log.info("frozen weights are not packed: %s", why)
        return 0
    for layer in layers:
        _switch(layer)
    log.info("frozen weights of %d layers are packed, which takes memory for two copies (model.packed)", len(layers))
    return len(layers)


def unpack(root: nn.Module) -> None:
    """Makes the layers what they were."""
    for layer in root.modules():
        if isinstance(layer, PackedLinear | PackedConv2d):
            del layer.packed
            own: Any = layer
            own.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d


class Packed:
    """Both packed forms of one layer's weight, each made when it is first needed."""

    def __init__(self) -> None:
        self._of: tuple[int, int, torch.dtype] | None = None  # which state of which weight
        self.forward: Tensor | None = None
        self.transposed: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> Packed:
        return Packed()

    def fits(self, weight: Tensor) -> bool:
        """Whether what is packed is this weight; what was never packed fits."""
        state = (weight.data_ptr(), weight._version, weight.dtype)
        if self._of is None:
            self._of = state
        return self._of == state


class PackedLinear(nn.Linear):
    """A frozen Linear."""

    packed: Packed

    def forward(self, input: Tensor) -> Tensor:
        x = _input(self, input)
        return super().forward(input) if x is None else cast(Tensor, _Linear.apply(x, self))

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs that it takes as they are."""
        return self.weight.dtype

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the input [..., in], from that of the output [..., out]."""
        if grad.dtype != self.weight.dtype or not self.packed.fits(self.weight):
            return grad @ self.weight
        if self.packed.transposed is None:
            self.packed.transposed = _ops()._reorder_linear_weight(self.weight.detach().t().contiguous(), _rows(grad))
            give_back([self.weight])
        return _ops()._linear_pointwise(grad.contiguous(), self.packed.transposed, None, "none", [], "")


class PackedConv2d(nn.Conv2d):
    """A frozen Conv2d."""

    packed: Packed

    def forward(self, input: Tensor) -> Tensor:
        x = _input(self, input) if input.ndim == 4 else None
        return super().forward(input) if x is None else cast(Tensor, _Conv2d.apply(x, self))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer, packed = layer, layer.packed
        if packed.forward is None:
            packed.forward = _ops()._reorder_linear_weight(layer.weight.detach(), _rows(x))
        return _ops()._linear_pointwise(x.contiguous(), packed.forward, layer.bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator hides the names of its arguments
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        return cast(PackedLinear, ctx.layer).input_gradient(grad_outputs[0]), None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedConv2d) -> Tensor:
        ctx.layer, ctx.size = layer, x.shape
        packed, stride, padding = layer.packed, list(layer.stride), _padding(layer)
        if packed.forward is None:
            packed.forward = _convolution(layer.weight.detach(), stride, padding, x)
        return _convolve(x, packed.forward, layer.bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator hides the names of its arguments
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        """The gradient, with zeros put in where the stride stepped over, convolved with the turned weight."""
        layer, (grad,) = cast(PackedConv2d, ctx.layer), grad_outputs
        sides = list(zip(ctx.size[2:], layer.kernel_size, _padding(layer), strict=True))
        if layer.stride != (1, 1):
            height, width = (side + 2 * pad - kernel + 1 for side, kernel, pad in sides)
            spread = grad.new_zeros(*grad.shape[:2], height, width)
            spread[:, :, :: layer.stride[0], :: layer.stride[1]] = grad
            grad = spread
        padding = [kernel - 1 - pad for _, kernel, pad in sides]
        if layer.packed.transposed is None:
            turned = layer.weight.detach().transpose(0, 1).flip(2, 3).contiguous()
            layer.packed.transposed = _convolution(turned, [1, 1], padding, grad)
            give_back([layer.weight])
        return _convolve(grad, layer.packed.transposed, None, [1, 1], padding), None


def _switch(layer: nn.Module) -> None:
    """Makes a packed layer of a plain one: its class is another, its weights are where they were."""
    kind, own = (PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d), cast(Any, layer)
    own.__class__ = kind
    own.packed = Packed()


def _takes(layer: nn.Module) -> bool:
    """Whether the layer is frozen and of a form that is packed."""
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return False
    if isinstance(layer, nn.Linear):
        return True
    assert isinstance(layer, nn.Conv2d)
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    whole = plain and not isinstance(layer.padding, str)
    return whole and all(pad < kernel for pad, kernel in zip(_padding(layer), layer.kernel_size, strict=True))


def _input(layer: PackedLinear | PackedConv2d, x: Tensor) -> Tensor | None:
    """What the packed layer is given, as autocast would have it; None where it must compute as ever."""
    weight = layer.weight
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    trained = weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    usable = not trained and x.dtype == weight.dtype and x.device.type == "cpu" and x.numel() > 0
    return x if usable and layer.packed.fits(weight) else None


def _unfit(layers: list[nn.Module], device: torch.device) -> str | None:
    """Why `auto` does not pack; None where it does."""
    if device.type != "cpu":
        return f"they are on {device}"
    weights = [cast(Tensor, layer.weight) for layer in layers]
    count = sum(weight.numel() for weight in weights)
    if count < SMALLEST:
        return f"{count / 1e6:.0f} million are too few to gain by it"
    needed = 3 * sum(weight.numel() * weight.element_size() for weight in weights)
    there: int = psutil.virtual_memory().total
    if needed > SHARE * there:
        return f"they and both copies take {needed / 2**30:.1f} GiB, more than half of this machine's memory"
    return None


def _trouble(dtype: torch.dtype) -> str | None:
    """What goes wrong in small layers, forward and backward; None where they are as the plain ones."""
    generator = torch.Generator().manual_seed(0)
    for plain, shape in (
        (nn.Linear(64, 48), (2, 8, 64)),
        (nn.Conv2d(32, 48, 3, padding=1), (2, 32, 8, 8)),
        (nn.Conv2d(32, 48, 3, stride=2, padding=1), (2, 32, 8, 8)),
        (nn.Conv2d(32, 48, 1), (2, 32, 8, 8)),
    ):
        with torch.no_grad():
            for parameter in plain.parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn / max(1, parameter[0].numel()) ** 0.5)
        plain.to(dtype).requires_grad_(False)
        x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        out: Tensor = plain(x)
        along = torch.randn(out.shape, generator=generator).to(dtype)
        (grad,) = torch.autograd.grad(out, x, along)
        _switch(plain)
        try:
            mine: Tensor = plain(x)
            (own,) = torch.autograd.grad(mine, x, along)
        except (RuntimeError, AttributeError, TypeError) as error:
            return f"this torch cannot ({str(error).strip().partition(chr(10))[0]})"
        far = max((mine - out).abs().max().item(), (own - grad).abs().max().item())
        if not far < TOLERANCE[dtype]:
            return f"a trial is off by {far:.2g}"
    return None


def _ops() -> Any:
    return torch.ops.mkldnn


def _convolution(weight: Tensor, stride: list[int], padding: list[int], x: Tensor) -> Tensor:
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # pyright: ignore
    return reorder(weight.to_mkldnn(), padding, stride, [1, 1], 1, list(x.shape))


def _convolve(x: Tensor, packed: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    return _ops()._convolution_pointwise(x.contiguous(), packed, bias, padding, stride, [1, 1], 1, "none", [], "")


def _padding(layer: nn.Conv2d) -> list[int]:
    return [int(pad) for pad in layer.padding]


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]
