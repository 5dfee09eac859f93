"""Rank and module dropout against forwards computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from trainer import registry
from trainer.adapters import ADAPTERS
from trainer.adapters.drops import Drops
from trainer.adapters.layered import Layers
from trainer.args import AdapterArgs
from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, Update, difference, lengths

P = 0.4
CONV = {"padding": 1, "stride": 2}


class Family:
    """Two layers, as large as a test needs."""

    text_encoders: dict[str, nn.Module] = {}  # noqa: RUF012

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.denoiser = nn.ModuleDict({"linear": nn.Linear(6, 12), "conv": nn.Conv2d(6, 12, 3, **CONV)}).eval()
        self.denoiser.requires_grad_(False)


def attached(options: dict[str, Any]) -> tuple[Family, Layers, dict[str, nn.Parameter]]:
    family = Family()
    args = AdapterArgs.model_validate({"match": ["linear", "conv"], **options})
    part: Layers = registry.load(ADAPTERS, args.kind, "adapter.kind")(args, 0)
    named = dict(part.attach(family))  # pyright: ignore[reportArgumentType]
    draw = torch.Generator().manual_seed(5)
    for parameter in named.values():
        parameter.data.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return family, part, named


def inputs(name: str, pictures: int = 5) -> Tensor:
    shape = (pictures, 7, 6) if name == "linear" else (pictures, 6, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def plain(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if name == "linear" else F.conv2d(x, weight, bias, **CONV)


def kept(part: Layers, name: str, shape: list[int]) -> Tensor:
    """What the adapter draws for a layer, which must be 0 and 1 / (1 - p) alone."""
    drops = dict(zip((path for _, path in part.modules()), part._drops, strict=True))[name]
    mask = drops.kept(torch.zeros(()), shape)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - P)])
    return mask


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_lora_leaves_out_ranks_of_each_picture(name: str) -> None:
    family, part, named = attached({"kind": "lora", "rank": 6, "alpha": 3.0, "rank_dropout": P})
    layer, x = family.denoiser[name], inputs(name)
    base = layer.get_base_layer()  # pyright: ignore
    part.redraw(11)
    mask = kept(part, name, [5, 6] if name == "conv" else [5, 1, 6])
    down, up = named[f"{name}.lora_A.weight"], named[f"{name}.lora_B.weight"]
    ranks = plain(name, x, down, None)
    ranks = ranks * (mask[..., None, None] if name == "conv" else mask)
    added = F.conv2d(ranks, up) if name == "conv" else F.linear(ranks, up)
    torch.testing.assert_close(layer(x), base(x) + 3.0 / 6 * added)
    assert len({tuple(row.flatten().tolist()) for row in mask}) > 1, "each picture has ranks of its own"


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loha_and_lokr_leave_out_output_channels(kind: str, name: str) -> None:
    family, part, _ = attached({"kind": kind, "rank": 3, "alpha": 2.0, "rank_dropout": P})
    layer, x = family.denoiser[name], inputs(name)
    base = layer.get_base_layer()  # pyright: ignore
    part.redraw(12)
    change = difference(part.modules()["denoiser", name], base.weight)
    mask = kept(part, name, [12, *[1] * (change.ndim - 1)])
    torch.testing.assert_close(layer(x), base(x) + plain(name, x, mask * change, None))


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_dora_turns_by_the_ranks_that_are_left(name: str, axis: str) -> None:
    options = {"kind": "dora", "rank": 6, "alpha": 6.0, "axis": axis, "rank_dropout": P}
    family, part, named = attached(options)
    layer, x = family.denoiser[name], inputs(name)
    base = layer.get_base_layer()  # pyright: ignore
    part.redraw(13)
    mask = kept(part, name, [6, *[1] * (base.weight.ndim - 1)]).flatten()
    down, up = named[f"{name}.lora_A.weight"].flatten(1), named[f"{name}.lora_B.weight"].flatten(1)
    turned = base.weight + (up @ torch.diag(mask) @ down).reshape(base.weight.shape)
    turned = named[f"{name}.magnitude"] * turned / lengths(turned, of_rows=axis == "output")
    torch.testing.assert_close(layer(x), plain(name, x, turned, base.bias), rtol=1e-4, atol=1e-5)


KINDS: dict[str, type[Update]] = {
    "lora": LoraTensors,
    "dora": LoraTensors,
    "loha": LohaTensors,
    "lokr": LokrTensors,
    "oft": Difference,
    "full": Difference,
}


def drawn(part: Layers, seed: int) -> list[float]:
    part.redraw(seed)
    return [
        value for drops in part._drops for value in (drops.everything(), *drops.kept(torch.zeros(()), [3]).tolist())
    ]


def options_of(kind: str) -> dict[str, Any]:
    own = {"oft": {"block": 2, "match": ["linear"]}, "full": {}}
    return {"kind": kind, "module_dropout": P, **own.get(kind, {"rank": 3, "rank_dropout": P})}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_left_out_is_the_bases_and_has_no_gradient(kind: str) -> None:
    family, part, named = attached(options_of(kind))
    x = inputs("linear")
    base = family.denoiser["linear"].get_base_layer()(x)  # pyright: ignore
    outs: list[bool] = []
    for seed in range(200):
        part.redraw(seed)
        result = family.denoiser["linear"](x)
        outs.append(torch.equal(result, base))
        assert result.requires_grad != outs[-1]
    assert sum(outs) / 200 == pytest.approx(P, abs=0.1)
    assert any(p.requires_grad for p in named.values())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_out_where_nothing_is_trained(kind: str) -> None:
    for name in ("linear", "conv")[: 1 if kind == "oft" else 2]:
        family, part, _ = attached(options_of(kind))
        x = inputs(name)
        base = family.denoiser[name].get_base_layer()  # pyright: ignore
        change = part.differences()["denoiser", name]
        bias = base.bias if change.bias is None else base.bias + change.bias
        whole = plain(name, x, base.weight + change.weight, bias)
        torch.testing.assert_close(family.denoiser[name](x), whole, rtol=1e-4, atol=1e-5)  # before the first draw
        part.redraw(1)
        family.denoiser.eval()
        torch.testing.assert_close(family.denoiser[name](x), whole, rtol=1e-4, atol=1e-5)
        with part.disabled():
            assert torch.equal(family.denoiser[name](x), base(x))
        assert type(part.modules()["denoiser", "linear"]) is KINDS[kind]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_a_draw_is_the_seeds_alone(kind: str) -> None:
    results: list[Tensor] = []
    for noise in (1, 2):
        family, part, _ = attached(options_of(kind))
        torch.manual_seed(noise)
        for seeds in ((3,), (), (4, 3)):
            for seed in seeds:
                part.redraw(seed)
            results.append(torch.cat([family.denoiser[name](inputs(name)).flatten() for name in ("linear", "conv")]))
        assert len({tuple(drawn(part, seed)) for seed in range(9)}) > 4
    assert all(torch.equal(result, results[0]) for result in results)


def test_layers_and_what_is_drawn_of_them_are_independent() -> None:
    one, other = Drops(P, P, "a"), Drops(P, P, "b")
    rows: list[list[float]] = []
    for seed in range(400):
        one.redraw(seed)
        other.redraw(seed)
        first = one.kept(torch.zeros(()), [1]).item()
        rows.append([first > 0, other.kept(torch.zeros(()), [1]).item() > 0, one.everything(), other.everything()])
    together = torch.corrcoef(torch.tensor(rows, dtype=torch.float32).T)
    assert (together - torch.eye(4)).abs().max() < 0.15


@pytest.mark.parametrize("kind", ["oft", "full"])
def test_what_has_no_ranks_leaves_out_none(kind: str) -> None:
    with pytest.raises(ValidationError, match=f"rank_dropout is 0.4, which does nothing for adapter.kind {kind}"):
        AdapterArgs.model_validate({"kind": kind, "rank_dropout": P})


def test_a_kind_of_ones_own_that_cannot_leave_ranks_out_says_so() -> None:
    """As a run's mistake (ValueError), which is told in a sentence."""
    with pytest.raises(ValueError, match=r"^adapter\.rank_dropout is not for kind trainer\.adapters\.full:Full$"):
        attached({"kind": "trainer.adapters.full:Full", "rank_dropout": P})
