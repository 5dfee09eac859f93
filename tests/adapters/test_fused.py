"""LoRA's own forward pass: PEFT's numbers, no more kept for the backward pass, and PEFT itself in any unusual case."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from trainer.adapters import fused
from trainer.adapters.fused import FusedLinear, fuse
from trainer.models.packed import pack
from trainer.models.quantised import quantise

SHAPES = [(7, 24), (2, 5, 24), (2, 3, 4, 24)]


def layered(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """PEFT's LoRA of a frozen layer, 24 -> 16, rank 4, with an update that is not zero."""
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(24, 16)).to(dtype).requires_grad_(False)
    LoraModel(root, LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **options), "default")
    layer: Any = root[0]
    for factor in (layer.lora_A.default, layer.lora_B.default):
        factor.weight.data = torch.randn(factor.weight.shape)
    return layer


def taught(layer: Any, x: Tensor, scope: Callable[[], Any] | None = None) -> list[Tensor]:
    """Output, and the gradients of x, A and B."""
    x = x.detach().requires_grad_()
    with scope() if scope else torch.enable_grad():
        out: Tensor = layer(x)
    along = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return [
        out.detach(),
        *torch.autograd.grad(out, [x, layer.lora_A.default.weight, layer.lora_B.default.weight], along),
    ]


def wide(layer: Any) -> Any:
    return copy.deepcopy(layer).double()


def rounded(dtype: torch.dtype) -> tuple[Any, Any]:
    """A LoRA on a layer in 8 bits, and one on a plain layer with the weight that those say, in double precision."""
    layer = layered(dtype)
    assert quantise(layer) == 1
    exact = layered(dtype)
    exact.base_layer.weight.data = layer.base_layer.weight
    return layer, wide(exact)


def bf16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As many as there were passes of our own."""
    calls: list[int] = []
    real = fused._Fused.apply  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(fused._Fused, "apply", lambda *given: (calls.append(1), real(*given))[1])  # pyright: ignore
    return calls


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_outputs_and_gradients_are_pefts(shape: tuple[int, ...], packed: bool, used: list[int]) -> None:
    layer = layered()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    right, theirs = taught(wide(layer), x.double()), taught(layer, x)
    if packed:
        assert pack(layer, "on", torch.device("cpu")) == 1
    fuse(layer)
    for mine, peft, exact in zip(taught(layer, x), theirs, right, strict=True):
        assert mine.dtype == peft.dtype
        torch.testing.assert_close(mine, peft, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
    assert len(used) == 1


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_in_bfloat16_it_is_as_near_to_double_precision_as_peft(packed: bool, used: list[int]) -> None:
    layer = layered(torch.bfloat16)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    right, theirs = taught(wide(layer), x.double()), taught(layer, x, bf16)
    if packed:
        pack(layer, "on", torch.device("cpu"))
    fuse(layer)
    for mine, peft, exact in zip(taught(layer, x, bf16), theirs, right, strict=True):
        assert mine.dtype == peft.dtype
        errors = [((found.double() - exact).norm() / exact.norm()).item() for found in (mine, peft)]
        assert errors[0] < 1e-2
        assert errors[0] < 1.5 * errors[1]
    assert len(used) == 1


@pytest.mark.parametrize(
    ("dtype", "scope", "most"), [(torch.float32, None, 1e-5), (torch.bfloat16, bf16, 1e-2)], ids=["fp32", "bf16"]
)
def test_on_a_layer_in_eight_bits_it_is_as_right(dtype: torch.dtype, scope: Any, most: float, used: list[int]) -> None:
    layer, exact = rounded(dtype)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    right, theirs = taught(exact, x.double()), taught(layer, x, scope)
    assert not used
    fuse(layer)
    for mine, peft, true in zip(taught(layer, x, scope), theirs, right, strict=True):
        assert mine.dtype == peft.dtype
        assert (mine.double() - true).norm() / true.norm() < most
    assert len(used) == 1


@pytest.mark.parametrize("eight_bits", [False, True])
def test_no_more_is_kept_than_by_peft(eight_bits: bool) -> None:
    """x and A x in bfloat16."""

    def kept(layer: Any) -> int:
        sizes: list[int] = []

        def size(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size() if tensor.shape[0] == 4096 else 0)
            assert not eight_bits or tensor.shape != (16, 24), "a float weight was kept"
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(size, lambda tensor: tensor), bf16():
            layer(torch.ones(4096, 24).bfloat16().requires_grad_())
        return sum(sizes)

    layer = rounded(torch.bfloat16)[0] if eight_bits else layered(torch.bfloat16)
    theirs = kept(layer)
    fuse(layer)
    assert kept(layer) == 4096 * (24 + 4) * 2 <= theirs


def listened(layer: Any) -> None:
    layer.lora_A.default.register_forward_hook(lambda *_: None)


def listened_below(layer: Any) -> None:
    layer.base_layer.register_full_backward_hook(lambda *_: None)


def trained_below(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_(True)


def off(layer: Any) -> None:
    layer.enable_adapters(False)


@pytest.mark.parametrize("change", [listened, listened_below, trained_below, off])
def test_what_is_unusual_is_left_to_peft(change: Callable[[Any], None], used: list[int]) -> None:
    layer = layered()
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    change(layer)
    expected: Tensor = layer(x)
    fuse(layer)
    assert torch.equal(layer(x), expected)
    assert not used


def test_half_precision_without_autocast_is_left_to_peft(used: list[int]) -> None:
    """It computes the update in float32 there, which small gradients need."""
    layer = layered(torch.float16)
    fuse(layer)
    assert layer(torch.ones(2, 24).half()).dtype == torch.float16
    assert not used


def test_layers_with_dropout_or_of_convolutions_stay_as_they_are() -> None:
    convolution = nn.Sequential(nn.Conv2d(4, 4, 3)).requires_grad_(False)
    LoraModel(convolution, LoraConfig(r=2, target_modules=["0"]), "default")
    kind = type(convolution[0])
    fuse(convolution[0])
    assert type(convolution[0]) is kind
    plain = nn.Linear(2, 2)
    fuse(plain)
    assert type(plain) is nn.Linear


def test_strength_is_obeyed() -> None:
    layer = layered()
    x = torch.ones(2, 24)
    base: Tensor = layer.base_layer(x)
    fuse(layer)
    full: Tensor = layer(x) - base
    layer.scaling["default"] *= 0.5
    torch.testing.assert_close(layer(x) - base, 0.5 * full)
    assert isinstance(layer, FusedLinear)
    assert isinstance(layer, Linear)
