"""Every kind of adapter on layers: it starts as the base, is what its update says, and leaves no trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from trainer import registry
from trainer.adapters import ADAPTERS
from trainer.adapters.layered import Layers
from trainer.args import AdapterArgs, ComponentOptim, ModelArgs
from trainer.models.sd15 import SD15
from trainer.optim import build
from trainer.types import Cond
from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, difference

CPU = torch.device("cpu")
CONV = "attention+ff+conv"
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"kind": "lora", "rank": 4, "rank_stabilised": True, "targets": CONV},
    "dora": {"kind": "dora", "rank": 4, "alpha": 2.0, "targets": CONV},
    "dora-rows": {"kind": "dora", "rank": 4, "axis": "output", "targets": CONV},
    "loha": {"kind": "loha", "rank": 3, "alpha": 6.0, "targets": CONV},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 3.0, "targets": CONV},
    "lokr-whole": {"kind": "lokr", "rank": 1000, "alpha": 500.0, "factor": 4},
    "oft": {"kind": "oft", "block": 8, "targets": "attention+ff"},
    "full": {"kind": "full", "targets": "all"},
    "norms": {"kind": "full", "targets": "norm"},
}


@pytest.fixture(scope="module")
def family(tiny_base: Path) -> SD15:
    """Shared: each test must leave it as it was."""
    return SD15.load(ModelArgs(base=str(tiny_base)), CPU)


def adapter(options: dict[str, Any], part: str = "denoiser") -> Layers:
    args = AdapterArgs.model_validate(options)
    return registry.load(ADAPTERS, args.kind, "adapter.kind")(args, 0, part)


@torch.no_grad()
def predict(family: SD15) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    xt, hidden = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 32, 32, generator=generator)
    return family.predict(xt, torch.tensor([10, 900]), Cond(hidden))


@torch.no_grad()
def fill(parameters: list[tuple[str, nn.Parameter]], size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    for _, parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def weights(family: SD15) -> dict[str, Tensor]:
    roots = {"unet": family.denoiser, **family.text_encoders}
    return {f"{n}.{k}": v.clone() for n, root in roots.items() for k, v in root.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_its_update_and_leaves_no_trace(family: SD15, kind: str) -> None:
    before, base = weights(family), predict(family)
    attributes = set(vars(family.denoiser))
    part = adapter(KINDS[kind])
    parameters = part.attach(family)
    try:
        assert {p.dtype for _, p in parameters} == {torch.float32}
        assert {id(p) for p in family.denoiser.parameters() if p.requires_grad} == {id(p) for _, p in parameters}
        assert torch.equal(predict(family), base)
        fill(parameters)
        on, changes = predict(family), part.differences()
        assert (on - base).abs().max() > 0.01
        with part.disabled():
            assert torch.equal(predict(family), base)
            with part.disabled():
                assert torch.equal(predict(family), base)
            assert torch.equal(predict(family), base)
        with part.scaled(0.0):
            assert torch.equal(predict(family), base)
        with part.scaled(0.5):
            half = predict(family)
        assert torch.equal(predict(family), on)
    finally:
        part.detach()
    assert torch.equal(predict(family), base)
    after = weights(family)
    assert list(after) == list(before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert set(vars(family.denoiser)) == attributes
    for strength, expected in ((1.0, on), (0.5, half)):
        for (_, path), change in changes.items():
            for name, delta in (("weight", change.weight), ("bias", change.bias)):
                if delta is not None:
                    original = before[f"unet.{path}.{name}"]
                    family.denoiser.get_parameter(f"{path}.{name}").data.copy_(original + strength * delta)
        torch.testing.assert_close(predict(family), expected, rtol=1e-5, atol=1e-5)
    family.denoiser.load_state_dict({k.removeprefix("unet."): v for k, v in before.items() if k.startswith("unet.")})


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_trains_text_encoders(family: SD15, kind: str) -> None:
    options = {k: v for k, v in KINDS[kind].items() if k != "targets"}
    targets = "norm" if kind == "norms" else "attention"
    before = family.encode(["a red star"]).hidden
    args = AdapterArgs.model_validate({**options, "text": {"train": True, "targets": targets}}).for_text()
    part: Layers = registry.load(ADAPTERS, args.kind, "adapter.kind")(args, 0, "text")
    assert part.component == "text"
    parameters = part.attach(family)
    try:
        assert all(name.startswith("text_encoder.") for name, _ in parameters)
        fill(parameters)
        hidden = family.encode(["a red star"]).hidden
        assert (hidden - before).abs().max() > 1e-3
        hidden.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in parameters if "norm2.bias" not in n)
        with part.disabled():
            assert torch.equal(family.encode(["a red star"]).hidden, before)
        assert {component for component, _ in part.modules()} == {"text_encoder"}
    finally:
        part.detach()


@pytest.mark.parametrize("base", [nn.Linear(6, 10), nn.Conv2d(6, 10, 3, padding=1, stride=2)])
def test_dora_over_the_output_axis_is_pefts(base: nn.Module) -> None:
    x = torch.randn(2, 6) if isinstance(base, nn.Linear) else torch.randn(2, 6, 8, 8)
    mine = registry.load(ADAPTERS, "dora", "x")(
        AdapterArgs.model_validate({"kind": "dora", "axis": "output", "rank": 3, "match": ["layer"]}), 0
    )
    root, other = nn.ModuleDict({"layer": base}), nn.ModuleDict({"layer": base})

    class Family:
        denoiser = root
        text_encoders: dict[str, nn.Module] = {}  # noqa: RUF012

    parameters = dict(mine.attach(Family()))
    fill(list(parameters.items()), 0.3)
    LoraModel(other, LoraConfig(r=3, lora_alpha=3, use_dora=True, target_modules=["layer"]), "default")
    theirs: Any = other["layer"]
    own = [parameters[f"layer.{n}"] for n in ("lora_A.weight", "lora_B.weight", "magnitude")]
    given = [
        theirs.lora_A["default"].weight,
        theirs.lora_B["default"].weight,
        theirs.lora_magnitude_vector["default"].weight,
    ]
    for parameter, from_mine in zip(given, own, strict=True):
        parameter.data.copy_(from_mine.data.reshape(parameter.shape))
    ours, pefts = root["layer"](x), theirs(x)
    torch.testing.assert_close(ours, pefts, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    pefts.square().sum().backward()
    for parameter, from_mine in zip(given, own, strict=True):
        assert parameter.grad is not None
        assert from_mine.grad is not None
        torch.testing.assert_close(from_mine.grad.reshape(parameter.shape), parameter.grad, rtol=1e-4, atol=1e-4)


def test_doras_columns_have_the_lengths_that_it_trains(family: SD15) -> None:
    part = adapter({"kind": "dora", "rank": 2, "targets": CONV})
    fill(part.attach(family))
    for (_, path), update in part.modules().items():
        assert isinstance(update, LoraTensors)
        assert update.magnitude is not None
        weight = part._layers["denoiser", path].get_base_layer().weight
        changed = weight + difference(update, weight)
        lengths = changed.transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, update.magnitude.flatten().abs())
        assert update.magnitude.shape == (1, weight.shape[1], *[1] * (weight.ndim - 2))
    part.detach()


def test_a_column_of_zeros_stays_finite() -> None:
    weight = torch.zeros(4, 3)
    update = LoraTensors(torch.ones(1, 3), torch.ones(4, 1), 1.0, torch.full((1, 3), 1e-7))
    assert difference(update, weight).isfinite().all()


def test_differences_are_the_papers_formulas() -> None:
    draw = torch.Generator().manual_seed(1)
    a, b, c, d = (torch.randn(n, generator=draw) for n in ((4, 2), (2, 6), (4, 2), (2, 6)))
    weight = torch.randn(4, 6, generator=draw)
    hadamard = torch.tensor([[3.0 * (a[o] @ b[:, i]) * (c[o] @ d[:, i]) for i in range(6)] for o in range(4)])
    torch.testing.assert_close(difference(LohaTensors(a, b, c, d, 6.0), weight), hadamard)
    w1, w2 = torch.randn(2, 3, generator=draw), torch.randn(2, 2, 3, 3, generator=draw)
    kernel = torch.zeros(4, 6, 3, 3)
    for o in range(4):
        for i in range(6):
            kernel[o, i] = 0.5 * w1[o // 2, i // 2] * w2[o % 2, i % 2]
    torch.testing.assert_close(difference(LokrTensors((w1,), (w2,), 0.5), torch.zeros(4, 6, 3, 3)), kernel)
    with pytest.raises(ValueError, match="does not fit"):
        difference(Difference(torch.zeros(4, 5)), weight)


def test_oft_rotates(family: SD15) -> None:
    part = adapter(KINDS["oft"])
    fill(part.attach(family), 0.5)
    change = next(iter(part.differences().values())).weight
    layer = next(iter(part._layers.values()))
    weight = layer.get_base_layer().weight
    blocks = (weight + change).unflatten(1, (-1, 8))
    torch.testing.assert_close(blocks.norm(dim=2), weight.unflatten(1, (-1, 8)).norm(dim=2), rtol=1e-4, atol=1e-5)
    part.detach()


def test_rslora_divides_by_the_root_of_the_rank(family: SD15) -> None:
    part = adapter({"kind": "lora", "rank": 4, "alpha": 3.0, "rank_stabilised": True})
    part.attach(family)
    update = next(iter(part.modules().values()))
    assert isinstance(update, LoraTensors)
    assert update.alpha / 4 == pytest.approx(3.0 / math.sqrt(4))
    part.detach()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_lora_plus_gives_b_a_faster_rate(family: SD15, kind: str) -> None:
    part = adapter({"kind": kind, "rank": 2, "lora_plus": 16.0})
    named = part.attach(family)
    optimizer = build(ComponentOptim(lr=1e-3), named, {name: part.lr_scale(name) for name, _ in named})
    scales = {name: group["scale"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {scale for name, scale in scales.items() if "lora_B" in name} == {16.0}
    assert {scale for name, scale in scales.items() if "lora_B" not in name} == {1.0}
    part.detach()


@pytest.mark.parametrize("kind", ["rslora", "loha", "lokr", "lokr-whole", "full"])
def test_max_norm_caps_each_layer(family: SD15, kind: str) -> None:
    part = adapter({**KINDS[kind], "max_norm": 0.5})
    fill(part.attach(family), 0.5)
    before = {key: change.weight.norm() for key, change in part.differences().items()}
    directions = {key: change.weight / change.weight.norm() for key, change in part.differences().items()}
    part.constrain()
    after = part.differences()
    assert max(before.values()) > 0.6
    for key, norm in before.items():
        assert after[key].weight.norm() == pytest.approx(min(0.5, norm.item()), rel=1e-3)
        torch.testing.assert_close(after[key].weight / after[key].weight.norm(), directions[key], rtol=1e-3, atol=1e-5)
    part.detach()


@pytest.mark.parametrize("kind", ["rslora", "dora", "lokr", "oft", "full"])
def test_l1_is_the_mean_change(family: SD15, kind: str) -> None:
    part = adapter({**KINDS[kind], "l1": 2.0})
    parameters = part.attach(family)
    fill(parameters)
    changes = torch.cat([change.weight.flatten() for change in part.differences().values()])
    penalty = part.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(2.0 * changes.abs().mean().item(), rel=1e-4)
    penalty.backward()
    assert all(p.grad is not None for n, p in parameters if "bias" not in n)
    part.detach()
