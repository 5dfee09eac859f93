"""Packed weights compute what plain ones do, stay out of the way of what trains, and leave no trace."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainer import registry
from trainer.adapters import ADAPTERS
from trainer.args import AdapterArgs, ModelArgs
from trainer.models import packed
from trainer.models.packed import PackedConv2d, PackedLinear, pack, unpack
from trainer.models.sd15 import SD15
from trainer.types import BaseModelError, Cond

CPU = torch.device("cpu")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(48, 40), (3, 5, 48)),
    "linear without bias": (lambda: nn.Linear(48, 40, bias=False), (7, 48)),
    "3x3": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 8, 8)),
    "1x1": (lambda: nn.Conv2d(16, 24, 1), (2, 16, 6, 7)),
    "stride 2": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (1, 16, 8, 8)),
    "stride 2 on odd sides": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (1, 16, 7, 9)),
    "stride 2 without padding": (lambda: nn.Conv2d(16, 24, 3, stride=2), (1, 16, 10, 10)),
    "no padding": (lambda: nn.Conv2d(16, 24, (3, 1)), (1, 16, 8, 8)),
}
pytestmark = pytest.mark.skipif(
    packed._trouble(torch.float32) is not None,  # pyright: ignore[reportPrivateUsage]
    reason="this torch has no packed operators",
)


def frozen(name: str) -> tuple[nn.Module, Tensor]:
    made, shape = LAYERS[name]
    torch.manual_seed(0)
    return made().requires_grad_(False), torch.randn(shape)


def through(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of its weighted sum to the input."""
    x = x.detach().requires_grad_()
    out: Tensor = layer(x)
    along = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, x, along)[0]


def off(found: Tensor, true: Tensor) -> float:
    """Relative error of a tensor."""
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_outputs_and_gradients_are_those_of_double_precision(name: str, dtype: torch.dtype, most: float) -> None:
    layer, x = frozen(name)
    layer, x = layer.to(dtype), x.to(dtype)
    true = through(copy.deepcopy(layer).double(), x.double())
    plain = through(layer, x)
    assert pack(layer, "on", CPU) == 1
    for turn in range(2):  # the second uses what the first has packed
        for mine, theirs, right in zip(through(layer, x), plain, true, strict=True):
            assert off(mine, right) < most, turn
            assert off(mine, right) < 3 * off(theirs, right), turn
    assert isinstance(layer, PackedLinear | PackedConv2d)
    assert layer.packed.forward is not None
    assert layer.packed.transposed is not None


def test_another_size_than_it_was_packed_for_is_right() -> None:
    layer, x = frozen("3x3")
    other = torch.randn(1, 16, 13, 5)
    expected = through(layer, other)
    pack(layer, "on", CPU)
    through(layer, x)
    for mine, theirs in zip(through(layer, other), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_a_weight_that_is_not_the_packed_one_counts(name: str) -> None:
    """Replaced for a call, changed in place, put into another dtype, or set to train."""
    layer, x = frozen(name)
    plain = copy.deepcopy(layer)
    pack(layer, "on", CPU)
    layer(x)
    weight = layer.get_parameter("weight")
    torch.testing.assert_close(
        functional_call(layer, {"weight": 2 * weight}, (x,)), functional_call(plain, {"weight": 2 * weight}, (x,))
    )
    weight.add_(1.0)
    plain.get_parameter("weight").add_(1.0)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.double()(x.double()), plain.double()(x.double()), rtol=0, atol=0)
    layer.requires_grad_(True)
    layer(x.double()).sum().backward()
    assert weight.grad is not None or layer.get_parameter("weight").grad is not None


def test_what_trains_is_not_packed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False), nn.Conv2d(4, 4, 3, groups=2))
    model[2].requires_grad_(False)
    assert pack(model, "on", CPU) == 1
    assert [type(layer) for layer in model] == [nn.Linear, PackedLinear, nn.Conv2d]


def test_autocast_is_obeyed() -> None:
    layer, x = frozen("linear")
    layer = layer.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected: Tensor = layer(x)
        pack(layer, "on", CPU)
        found: Tensor = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_a_copy_packs_its_own_and_unpacking_leaves_nothing() -> None:
    layer, x = frozen("3x3")
    before = set(vars(layer))
    pack(layer, "on", CPU)
    layer(x)
    copied = copy.deepcopy(layer)
    copied.get_parameter("weight").zero_()
    assert not (copied(x) - copied.get_parameter("bias")[:, None, None]).any()
    assert layer(x).abs().max() > 0.1
    unpack(layer)
    assert type(layer) is nn.Conv2d
    assert set(vars(layer)) == before


def test_auto_leaves_small_models_and_other_devices(caplog: pytest.LogCaptureFixture) -> None:
    layer, _ = frozen("linear")
    with caplog.at_level(logging.INFO):
        assert pack(layer, "auto", CPU) == 0
        assert pack(layer, "auto", torch.device("cuda")) == 0
    assert "too few to gain" in caplog.text
    assert "they are on cuda" in caplog.text
    assert pack(layer, "off", CPU) == 0
    with pytest.raises(BaseModelError, match=r"model\.packed is on.*the device is cuda.*take auto or off"):
        pack(layer, "on", torch.device("cuda"))


def test_auto_leaves_what_memory_would_not_hold(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed, "SMALLEST", 10)
    layer, _ = frozen("linear")
    with caplog.at_level(logging.INFO):
        monkeypatch.setattr(packed, "SHARE", 1e-9)
        assert pack(layer, "auto", CPU) == 0
        monkeypatch.undo()
        monkeypatch.setattr(packed, "SMALLEST", 10)
        assert pack(layer, "auto", CPU) == 1
    assert "more than half of this machine's memory" in caplog.text


@pytest.mark.parametrize("how", ["raises", "is wrong"])
def test_operators_that_fail_a_trial_are_not_used(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            if how == "raises":
                raise AttributeError(f"there is no {name}")
            return zeros if name == "_linear_pointwise" else itself

    def itself(x: Tensor, *rest: Any) -> Tensor:
        return x

    def zeros(x: Tensor, *rest: Any) -> Tensor:
        return x.new_zeros(2, 8, 48)

    monkeypatch.setattr(packed, "_ops", Broken)
    monkeypatch.setattr(packed, "SMALLEST", 10)
    layer, _ = frozen("linear")
    with caplog.at_level(logging.INFO):
        assert pack(layer, "auto", CPU) == 0
    assert type(layer) is nn.Linear
    assert "frozen weights are not packed" in caplog.text
    with pytest.raises(BaseModelError, match=r"model\.packed is on, which cannot be had here"):
        pack(layer, "on", CPU)


@pytest.fixture(scope="module")
def families(tiny_base: Path) -> tuple[SD15, SD15]:
    """A plain and a packed one; each test must leave them as they were."""
    tree = {"base": str(tiny_base), "packed": "on"}
    return SD15.load(ModelArgs.model_validate({"base": str(tiny_base)}), CPU), SD15.load(
        ModelArgs.model_validate(tree), CPU
    )


def predicted(family: SD15) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    xt, hidden = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 32, 32, generator=generator)
    return family.predict(xt, torch.tensor([10, 900]), Cond(hidden))


def test_the_tiny_base_is_packed_when_it_must_be(families: tuple[SD15, SD15]) -> None:
    plain, full = ([type(m) for m in family.denoiser.modules()] for family in families)
    assert full.count(PackedLinear) == plain.count(nn.Linear) > 20
    assert full.count(PackedConv2d) == plain.count(nn.Conv2d) > 10


@pytest.mark.parametrize(
    "options",
    [{"kind": kind, "targets": "all"} for kind in ("lora", "dora", "loha", "lokr", "full")]
    + [{"kind": "oft", "block": 8}],
    ids=lambda options: options["kind"],
)
def test_adapters_train_on_packed_weights_as_on_plain_ones(
    families: tuple[SD15, SD15], options: dict[str, Any]
) -> None:
    outputs: list[Tensor] = []
    gradients: list[dict[str, Tensor]] = []
    for family in families:
        base = predicted(family)
        classes = {name: type(module) for name, module in family.denoiser.named_modules()}
        adapter = registry.load(ADAPTERS, options["kind"], "adapter.kind")(AdapterArgs.model_validate(options), 0)
        parameters = adapter.attach(family)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in parameters:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        out = predicted(family)
        out.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in parameters if parameter.grad is not None})
        with torch.no_grad(), adapter.disabled():
            torch.testing.assert_close(predicted(family), base, rtol=0, atol=0)
        adapter.detach()
        torch.testing.assert_close(predicted(family), base, rtol=0, atol=0)
        assert {name: type(module) for name, module in family.denoiser.named_modules()} == classes
        outputs += [base, out.detach()]
    base, changed, packed_base, packed_changed = outputs
    assert (changed - base).abs().max() > 1e-3
    torch.testing.assert_close(packed_base, base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed_changed, changed, rtol=1e-4, atol=1e-4)
    plain, full = gradients
    assert plain.keys() == full.keys()
    errors = sorted(off(full[name], plain[name].double()) for name in plain if plain[name].norm() > 1e-9)
    assert errors[len(errors) // 2] < 1e-5
    assert errors[-1] < 1e-3
