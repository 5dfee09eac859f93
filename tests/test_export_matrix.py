"""Family x adapter x targets x text encoders: the kohya file's exact keys and shapes, and what a plain reading gives.

A reading is compared at the layers' outputs with the live adapter's own forward pass, so it leans on nothing of the
trainer's arithmetic. Errors are relative to the change of that output.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility import BASES, KINDS, WORST
from test_export_kinds import changed
from torch import Tensor, nn
from torch.func import functional_call

from trainer import registry
from trainer.adapters import ADAPTERS
from trainer.adapters.layered import Layers
from trainer.args import AdapterArgs, ExportArgs, ModelArgs
from trainer.export.learned import Learned
from trainer.layouts import kohya_state
from trainer.models import FAMILIES
from trainer.models.spelling import ldm_paths
from trainer.types import ModelFamily

TARGETS = ("attention", "attention+ff", "attention+ff+conv", "all")
PREFIXES = {
    "sd15": {"text_encoder": "lora_te"},
    "sd2": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cells(family: str, kind: str) -> Iterator[dict[str, Any]]:
    """Targets and text encoders of a row: all of them with SD1.5, the narrowest and the widest with the others."""
    targets = TARGETS[:2] if kind == "oft" else TARGETS  # rotations are of Linear layers
    if family != "sd15":
        targets = (targets[0], targets[-1])
    for target in targets:
        text = "attention+ff" if kind == "oft" else "all"
        yield {"targets": target}
        yield {"targets": target, "text": {"train": True, "targets": text}}
    if kind == "full":
        yield {"targets": "norm", "text": {"train": True, "targets": "norm"}}


def widest(kind: str) -> tuple[str, ...]:
    return ("attention+ff",) if kind == "oft" else ("all", "norm")


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> ModelFamily:
    path: Path = request.getfixturevalue(BASES[request.param])
    return registry.load(FAMILIES, request.param, "family").load(ModelArgs(base=str(path)), torch.device("cpu"))


def attached(family: ModelFamily, options: dict[str, Any]) -> list[Layers]:
    args = AdapterArgs.model_validate(options)
    kind = registry.load(ADAPTERS, args.kind, "adapter.kind")
    parts: list[Layers] = [kind(args, 0)]
    if args.text.train:
        parts.append(kind(args.for_text(), 1, "text"))
    generator = torch.Generator().manual_seed(5)
    for part in parts:
        part.attach(family)
        for tensor in part.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return parts


def name_of(family: ModelFamily, component: str, path: str) -> str:
    """The prefix that docs/formats.md gives for a layer."""
    if component == "denoiser":
        unet: Any = family.denoiser
        own = ldm_paths(unet.config)(path) if family.name == "sdxl" else path
        return f"lora_unet_{own}".replace(".", "_")
    own = path.removeprefix("text_model.")
    return f"{PREFIXES[family.name][component]}_text_model_{own}".replace(".", "_")


def shapes(kind: str, layer: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """The ends and shapes that docs/formats.md gives for a layer."""
    base = layer.get_base_layer()
    weight, bias = tuple(base.weight.shape), base.bias
    if len(weight) == 1 or kind == "full":
        return {"diff": weight, **({} if bias is None else {"diff_b": tuple(bias.shape)})}
    if kind in ("oft", "dora-rows"):
        return {"diff": weight}
    o, i, *kernel = weight
    ones = (1,) * len(kernel)
    inputs = i * base.weight[0, 0].numel()
    rank = min(rank, o, inputs)
    low = {"lora_down.weight": (rank, i, *kernel), "lora_up.weight": (o, rank, *ones), "alpha": ()}
    if kind == "lora":
        return low
    if kind == "dora":
        return {**low, "dora_scale": (1, i, *ones)}
    if kind == "loha":
        sides = {"w1_a": (o, rank), "w1_b": (rank, inputs), "w2_a": (o, rank), "w2_b": (rank, inputs)}
        return {**{f"hada_{end}": shape for end, shape in sides.items()}, "alpha": ()}
    raise AssertionError(kind)


def is_lokr(ends: dict[str, tuple[int, ...]], weight: Tensor, rank: int) -> bool:
    """Two matrices whose sides multiply to the weight's, the larger one whole or as factors of the rank."""
    o1, i1 = ends["lokr_w1"]
    o, i, *kernel = weight.shape
    if o % o1 or i % i1:
        return False
    whole = {"lokr_w2": (o // o1, i // i1, *kernel)}
    rest = i // i1 * weight[0, 0].numel()
    factors = {"lokr_w2_a": (o // o1, rank), "lokr_w2_b": (rank, rest)}
    return {**ends, "alpha": ()} == ends and {k: v for k, v in ends.items() if "w2" in k} in (whole, factors)


def inputs(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(layer, nn.Conv2d):
        return torch.randn(1, layer.in_channels, 5, 5, generator=generator)
    if isinstance(layer, nn.GroupNorm):
        return torch.randn(1, layer.num_channels, 4, 4, generator=generator)
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.normalized_shape[0]  # type: ignore[union-attr]
    return torch.randn(4, width, generator=generator)


@torch.no_grad()
def error(state: dict[str, Tensor], name: str, layer: Any) -> float:
    """How far the reading's output is from the live one, relative to what training changed about it."""
    base = layer.get_base_layer()
    weights = {"weight": changed(state, name, base.weight)}
    if f"{name}.diff_b" in state:
        weights["bias"] = base.bias + state[f"{name}.diff_b"].float()
    given = inputs(base)
    live, plain, read = layer(given), base(given), functional_call(base, weights, (given,))
    return float((read - live).abs().max() / (live - plain).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", BASES, indirect=True)
def test_every_cell_is_what_the_rules_say(family: ModelFamily, kind: str) -> None:
    rank, alpha = 2, 3.0
    roots = {"denoiser": family.denoiser, **family.text_encoders}
    for cell in cells(family.name, kind):
        options = {**KINDS[kind], **cell}
        parts = attached(family, options)
        try:
            modules = Learned(parts, ExportArgs.model_validate({})).readable()
            state = {key: tensor.clone() for key, tensor in kohya_state(modules, family.clients).items()}
            wanted: dict[str, tuple[str, Any]] = {}
            for component, root in roots.items():
                for path, layer in root.named_modules():
                    if hasattr(layer, "base_layer"):
                        wanted[name_of(family, component, path)] = component, layer
            assert wanted
            assert {component for component, _ in wanted.values()} == (set(roots) if "text" in cell else {"denoiser"})
            assert {key.split(".", 1)[0] for key in state} == wanted.keys()
            for name, (_, layer) in wanted.items():
                ends = {
                    key.split(".", 1)[1]: tuple(t.shape) for key, t in state.items() if key.split(".", 1)[0] == name
                }
                if kind == "lokr":
                    assert is_lokr(ends, layer.get_base_layer().weight, rank), (cell, name)
                else:
                    assert ends == shapes(kind, layer, rank), (cell, name)
                if "lora_up.weight" in ends or "hada_w1_a" in ends:
                    assert float(state[f"{name}.alpha"]) == alpha
            if "text" not in cell or cell["targets"] not in widest(kind):
                continue  # the layers of other cells are among these
            for precision, dtype in PRECISIONS.items():
                rounded = {key: t.to(dtype) if t.ndim else t for key, t in state.items()}
                worst = max(error(rounded, name, layer) for name, (_, layer) in wanted.items())
                assert worst < WORST[kind][precision], (cell, precision, worst)
        finally:
            for part in reversed(parts):
                part.detach()
