"""Each kind's file, read here as clients read it, gives the weights that training ended with; and we draw with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer import export as exporting
from trainer import generate, layouts, registry, sampler
from trainer.adapters import ADAPTERS
from trainer.adapters.layered import Layers
from trainer.args import AdapterArgs, ModelArgs, TrainArgs
from trainer.models import FAMILIES
from trainer.models.sd15 import SD15
from trainer.run import RunError
from trainer.run.parts import begin

CPU = torch.device("cpu")
CONV = "attention+ff+conv"
TEXT = {"train": True, "rank": 2, "targets": "attention+ff"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 2.0, "ranks": {"mid_block": 2}, "alphas": {"proj_in": 3.0}, "targets": CONV},
    "lora-all": {"rank": 8, "targets": "all", "text": TEXT},
    "rslora": {"rank": 4, "alpha": 2.0, "rank_stabilised": True},
    "dora": {"kind": "dora", "rank": 4, "alpha": 2.0, "targets": CONV, "text": TEXT},
    "dora-rows": {"kind": "dora", "rank": 4, "alpha": 2.0, "axis": "output", "targets": CONV},
    "loha": {"kind": "loha", "rank": 3, "alpha": 6.0, "targets": CONV, "text": TEXT},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 3.0, "targets": CONV},
    "lokr-whole": {"kind": "lokr", "rank": 1000, "alpha": 500.0, "factor": 4, "targets": CONV},
    "oft": {"kind": "oft", "block": 8},
    "full": {"kind": "full", "targets": "all", "text": {"train": True, "targets": "all"}},
    "norms": {"kind": "full", "targets": "norm"},
}
BY_DIFFUSERS = ("lora", "lora-all", "rslora", "dora-rows")


def arguments(base: Path, kind: str, **model: Any) -> TrainArgs:
    return TrainArgs.model_validate(
        {
            "data": {"source": "pictures"},
            "model": {"base": str(base), **model},
            "adapter": KINDS[kind],
            "export": {"layouts": ["kohya", "diffusers"] if kind in BY_DIFFUSERS else ["kohya"]},
        }
    )


def trained(family: SD15, args: TrainArgs, size: float = 0.1) -> list[Layers]:
    kind = registry.load(ADAPTERS, args.adapter.kind, "adapter.kind")
    parts: list[Layers] = [kind(args.adapter, 0)]
    if args.adapter.text.train:
        parts.append(kind(args.adapter.for_text(), 1, "text"))
    generator = torch.Generator().manual_seed(5)
    for part in parts:
        part.attach(family)
        for tensor in part.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * size)
    return parts


def changed(state: dict[str, Tensor], key: str, weight: Tensor) -> Tensor:
    """W' as the loaders of ComfyUI compute it, from one module's tensors."""
    part = {name.removeprefix(f"{key}."): t.float() for name, t in state.items() if name.startswith(f"{key}.")}
    if "diff" in part:
        return weight + part["diff"]
    if "hada_w1_a" in part:
        both = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
        return weight + part["alpha"] / part["hada_w1_b"].shape[0] * both.reshape(weight.shape)
    if any(name.startswith("lokr") for name in part):
        dim = None
        if "lokr_w1" not in part:
            part["lokr_w1"], dim = part["lokr_w1_a"] @ part["lokr_w1_b"], part["lokr_w1_b"].shape[0]
        if "lokr_w2" not in part:
            part["lokr_w2"], dim = part["lokr_w2_a"] @ part["lokr_w2_b"], part["lokr_w2_b"].shape[0]
        w1, w2 = part["lokr_w1"], part["lokr_w2"]
        if w2.ndim == 4:
            w1 = w1[:, :, None, None]
        scale = 1.0 if dim is None else part["alpha"] / dim
        return weight + scale * torch.kron(w1, w2).reshape(weight.shape)
    down, up = part["lora_down.weight"], part["lora_up.weight"]
    moved = weight + part["alpha"] / down.shape[0] * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    if "dora_scale" not in part:
        return moved
    columns = moved.transpose(0, 1).reshape(weight.shape[1], -1).norm(dim=1)
    return moved * (part["dora_scale"].flatten() / columns).reshape(1, -1, *[1] * (weight.ndim - 2))


def layers_of(family: SD15) -> dict[tuple[str, str], nn.Module]:
    roots = {"denoiser": family.denoiser, **family.text_encoders}
    return {(name, path): module for name, root in roots.items() for path, module in root.named_modules()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_the_update(tiny_base: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    args = arguments(tiny_base, kind, dtype=dtype)
    family = SD15.load(args.model, CPU)
    weights = {key: m.weight.detach().float() for key, m in layers_of(family).items() if hasattr(m, "weight")}
    parts = trained(family, args)
    exporting.export(tmp_path, "run", family, parts, args)
    state = load_file(tmp_path / "run.safetensors")
    seen = 0
    for part in parts:
        for key, change in part.differences().items():
            got = changed(state, family.clients.kohya(*key), weights[key]) - weights[key]
            off = (got - change.weight).norm() / change.weight.norm()
            assert off < (1e-4 if dtype == "fp32" else 3e-2), (key, off)  # of the change; bf16 has 8 bits
            if change.bias is not None:
                torch.testing.assert_close(
                    state[f"{family.clients.kohya(*key)}.diff_b"].float(), change.bias, rtol=1e-2, atol=0
                )
            seen += 1
    assert len({name.split(".")[0] for name in state}) == seen


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_draw_from_the_file_is_what_the_trainer_draws(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    args = arguments(tiny_base, kind)
    family = SD15.load(args.model, CPU)
    plain = sampler.generate(family, ["a red star"], seeds=[3], steps=2, guidance=2.0)
    parts = trained(family, args)
    exporting.export(tmp_path, "run", family, parts, args)
    painter = generate.Painter(args.model, CPU)
    learned = painter.read(generate.find(tmp_path / "run.safetensors"))
    for strength in (1.0, 0.5):
        live = sampler.generate(
            family, ["a red star"], seeds=[3], steps=2, guidance=2.0, adapters=parts, strength=strength
        )
        painter.use([generate.Weighted(learned, generate.Strength(strength))])
        drawn = painter.draw(["a red star"], [3], generate.Look(steps=2, guidance=2.0))
        assert difference(drawn[0], live[0]) <= 1
        assert difference(live[0], plain[0]) > 2


def difference(a: Any, b: Any) -> int:
    return int(abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16)).max())


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_what_it_can_and_the_note_says_the_rest(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    args = arguments(tiny_base, kind)
    family = SD15.load(args.model, CPU)
    exporting.export(tmp_path, "run", family, trained(family, args), args)
    note = (tmp_path / "README.md").read_text()
    file = tmp_path / "pytorch_lora_weights.safetensors"
    if kind not in BY_DIFFUSERS:
        assert not file.exists()
        assert "There is no file for `load_lora_weights`: it reads no " in note
        assert "pipe." not in note
        return
    assert "There is no file" not in note
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    with torch.no_grad():
        inputs = torch.ones(1, 4, 16, 16), torch.tensor([100]), torch.ones(1, 32, 32) / 2
        live, loaded = family.denoiser(*inputs).sample, pipe.unet(*inputs).sample
        torch.testing.assert_close(loaded, live, rtol=1e-4, atol=2e-5)
        ids = torch.tensor([[572, 1, 2, 3, 573]])
        mine, theirs = family.text_encoders["text_encoder"](ids)[0], pipe.text_encoder(ids)[0]
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("oft", "dora-rows")])
def test_a_run_starts_from_a_file(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    args = arguments(tiny_base, kind)
    family = SD15.load(args.model, CPU)
    before = trained(family, args)
    exporting.export(tmp_path, "run", family, before, args)
    expected = {key: change for part in before for key, change in part.differences().items()}
    other = SD15.load(args.model, CPU)
    adapter = args.adapter.model_copy(update={"start": str(tmp_path / "run.safetensors")})
    args = args.model_copy(update={"adapter": adapter})
    parts = trained(other, args, size=0.0)
    begin(args, other, parts)
    for part in parts:
        for key, change in part.differences().items():
            torch.testing.assert_close(change.weight, expected[key].weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "start", "said"),
    [
        ({"rank": 2}, "lora", r"does not fit at denoiser .*are the ranks equal"),
        ({"rank": 4}, "lokr", "holds a LoKr, and adapter.kind is lora"),
        ({"rank": 4, "targets": "attention"}, "lora", "which this adapter does not train"),
        ({"rank": 4, "targets": CONV}, "lora-all", r"text encoders; turn adapter.text.train on"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    tiny_base: Path, tmp_path: Path, given: dict[str, Any], start: str, said: str
) -> None:
    args = arguments(tiny_base, start)
    family = SD15.load(args.model, CPU)
    exporting.export(tmp_path, "run", family, trained(family, args), args)
    options = {"targets": CONV, **given, "start": str(tmp_path / "run.safetensors")}
    args = args.model_copy(update={"adapter": AdapterArgs.model_validate(options)})
    other = SD15.load(args.model, CPU)
    with pytest.raises((ValueError, RunError), match=said):
        begin(args, other, trained(other, args))


def test_what_is_not_understood_is_listed(tiny_base: Path, tmp_path: Path) -> None:
    family = SD15.load(ModelArgs(base=str(tiny_base)), CPU)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    good = {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(32, 2)}
    cases = {
        "tensors that are not understood: x.oft_blocks": {**good, "x.oft_blocks": torch.ones(1)},
        "1 layers that the base has not": {**good, "lora_unet_x.lora_up.weight": torch.ones(1)},
        "are no update that is understood": {f"{key}.lora_down.weight": torch.ones(2, 32)},
        "a dora_scale of": {**good, f"{key}.dora_scale": torch.ones(32)},
    }
    for said, tensors in cases.items():
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(layouts.LayoutError, match=said):
            layouts.read(tmp_path / "x.safetensors", family)
    save_file(good, tmp_path / "x.safetensors")
    assert layouts.read(tmp_path / "x.safetensors", family).keys() == {
        ("denoiser", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    }
    for given in (tmp_path, tmp_path / "no.safetensors"):
        with pytest.raises(layouts.LayoutError):
            layouts.files_of(given)


@pytest.mark.parametrize("file", ["run.safetensors", "pytorch_lora_weights.safetensors"])
def test_merging_is_the_formula_and_changes_fingerprints(tiny_base: Path, tmp_path: Path, file: str) -> None:
    args = arguments(tiny_base, "lora-all")
    family = SD15.load(args.model, CPU)
    parts = trained(family, args)
    modules = {key: update for part in parts for key, update in part.modules().items()}
    exporting.export(tmp_path, "run", family, parts, args)
    plain, merged = SD15.load(args.model, CPU), SD15.load(args.model, CPU)
    layouts.merge(merged, {str(tmp_path / file): 0.7})
    before = {key: m.weight for key, m in layers_of(plain).items() if hasattr(m, "weight")}
    for key, layer in layers_of(merged).items():
        if hasattr(layer, "weight"):
            expected = before[key].clone()
            if key in modules:
                update: Any = modules[key]
                product = update.up.flatten(1) @ update.down.flatten(1)
                expected += 0.7 * update.alpha / update.down.shape[0] * product.reshape(expected.shape)
            torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-6)
    assert merged.fingerprint("denoiser") != plain.fingerprint("denoiser")
    assert merged.fingerprint("text_encoder") != plain.fingerprint("text_encoder")
    assert merged.fingerprint("vae") == plain.fingerprint("vae")


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_sdxls_names_are_read_back(tiny_sdxl: Path, tmp_path: Path, kind: str) -> None:
    args = arguments(tiny_sdxl, kind)
    family = registry.load(FAMILIES, "sdxl", "model.family").load(args.model, CPU)
    parts = trained(family, args)
    exporting.export(tmp_path, "run", family, parts, args)
    live = {key: change for part in parts for key, change in part.differences().items()}
    fresh = registry.load(FAMILIES, "sdxl", "model.family").load(args.model, CPU)
    updates = layouts.read(tmp_path / "run.safetensors", fresh)
    assert {component for component, _ in updates} == {"denoiser", "text_encoder", "text_encoder_2"}
    assert updates.keys() == live.keys()
    before = {key: m.weight.detach().clone() for key, m in layers_of(fresh).items() if hasattr(m, "weight")}
    layouts.Blend(fresh).set([(updates, lambda component, path: 1.0)])
    for key, layer in layers_of(fresh).items():
        if key in live:
            torch.testing.assert_close(layer.weight - before[key], live[key].weight, rtol=1e-3, atol=1e-5)


def test_the_note_and_facts_tell_the_kind(tiny_base: Path, tmp_path: Path) -> None:
    for kind, words, facts in (
        ("lora", "LoRA of (rank, alpha) (2, 2), (2, 3)", ("networks.lora", "Dynamic", None)),
        ("loha", "LoHa of rank 3, alpha 6, on attention, ff, conv", ("lycoris.kohya", "Dynamic", "loha")),
        ("norms", "Full differences, on norm", ("lycoris.kohya", None, "full")),
    ):
        args = arguments(tiny_base, kind, merge={"/somewhere/style.safetensors": 0.5})
        family = SD15.load(args.model, CPU)
        exporting.export(tmp_path, "run", family, trained(family, args), args)
        note = (tmp_path / "README.md").read_text()
        assert words in note
        assert "`style.safetensors` at 0.5" in note
        assert "/somewhere" not in note
        with safe_open(tmp_path / "run.safetensors", framework="pt") as opened:
            shown = opened.metadata()
        assert shown["ss_network_module"] == facts[0]
        assert shown.get("ss_network_dim") == facts[1]
        assert json.loads(shown.get("ss_network_args", "{}")).get("algo") == facts[2]
