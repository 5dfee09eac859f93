"""Files as each program writes them are read into the updates that they mean, all of a file or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from trainer import layouts, registry
from trainer.adapters import ADAPTERS
from trainer.args import AdapterArgs, ModelArgs
from trainer.models import FAMILIES
from trainer.models.sd15 import SD15
from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, difference

CPU = torch.device("cpu")
UNET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT = "encoder.layers.1.self_attn.out_proj"
KOHYA = ("lora_down.weight", "lora_up.weight")
# What the programs call UNET and TEXT, and the ends of their tensors' names: docs/imports.md has the sources.
SPELLED = {
    "kohya": ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.", KOHYA),
    "kohya, original names": ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0.", KOHYA),
    "LyCORIS": ("lycoris_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.", KOHYA),
    "OneTrainer": (f"unet.{UNET}.", KOHYA),
    "OneTrainer, original names": ("unet.middle_block.1.transformer_blocks.0.attn1.to_out.0.", KOHYA),
    "ComfyUI": ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0.", KOHYA),
    "diffusers": (f"unet.{UNET}.", ("lora_A.weight", "lora_B.weight")),
    "diffusers 0.22": (f"unet.{UNET}.", ("lora.down.weight", "lora.up.weight")),
    "diffusers 0.17": (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
        ("_lora.down.weight", "_lora.up.weight"),
    ),
    "cog-sdxl": (
        "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
        ("_lora.down.weight", "_lora.up.weight"),
    ),
    "PEFT": (f"base_model.model.{UNET}.", ("lora_A.weight", "lora_B.weight")),
    "PEFT, of a live model": (f"base_model.model.{UNET}.", ("lora_A.default.weight", "lora_B.default.weight")),
}
SPELLED_TEXT = {
    "kohya": (f"lora_te_text_model_{TEXT.replace('.', '_')}.", KOHYA),
    "kohya of SDXL": (f"lora_te1_text_model_{TEXT.replace('.', '_')}.", KOHYA),
    "OneTrainer": (f"clip_l.text_model.{TEXT}.", KOHYA),
    "diffusers": (f"text_encoder.text_model.{TEXT}.", ("lora_A.weight", "lora_B.weight")),
    "diffusers, transformers 5": (f"text_encoder.{TEXT}.", ("lora_A.weight", "lora_B.weight")),
    "diffusers 0.22": (
        f"text_encoder.text_model.{TEXT}.",
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ),
    "diffusers 0.17": (
        "text_encoder.text_model.encoder.layers.1.self_attn.to_out",
        ("_lora.down.weight", "_lora.up.weight"),
    ),
}


@pytest.fixture(scope="module")
def sd15(tiny_base: Path) -> SD15:
    return SD15.load(ModelArgs(base=str(tiny_base)), CPU)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> Any:
    return registry.load(FAMILIES, "sdxl", "model.family").load(ModelArgs(base=str(tiny_sdxl)), CPU)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def read(folder: Path, family: Any, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Any:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "x.safetensors", metadata)
    return layouts.read(folder / "x.safetensors", family)


def pair(name: str, ends: tuple[str, str]) -> dict[str, Tensor]:
    return {name + ends[0]: drawn(3, 32), name + ends[1]: drawn(32, 3, seed=1)}


@pytest.mark.parametrize("program", SPELLED)
def test_every_spelling_of_a_layer_is_read(sd15: SD15, tmp_path: Path, program: str) -> None:
    found = read(tmp_path, sd15, pair(*SPELLED[program]))
    ((key, update),) = found.items()
    assert key == ("denoiser", UNET)
    assert torch.equal(update.down, drawn(3, 32))
    assert torch.equal(update.up, drawn(32, 3, seed=1))
    assert (update.alpha, update.magnitude) == (3.0, None)  # without a word of alpha the scale is 1


@pytest.mark.parametrize("program", SPELLED_TEXT)
def test_every_spelling_of_a_text_layer_is_read(sd15: SD15, tmp_path: Path, program: str) -> None:
    name, ends = SPELLED_TEXT[program]
    found = read(tmp_path, sd15, {**pair(name, ends), f"{name.rstrip('.')}.alpha": torch.tensor(1.5)}
                 if not name.endswith("to_out") else pair(name, ends))  # fmt: skip
    assert list(found) == [("text_encoder", TEXT)]
    assert found["text_encoder", TEXT].alpha == (3.0 if name.endswith("to_out") else 1.5)


def test_sdxl_goes_by_both_names_and_has_two_towers(sdxl: Any, tmp_path: Path) -> None:
    block = "transformer_blocks_1_attn1_to_q"
    tensors = {
        **{f"lora_unet_down_blocks_1_attentions_0_{block}.{end}": drawn(*size) for end, size in sizes(32).items()},
        **{f"lora_unet_middle_block_1_{block}.{end}": drawn(*size) for end, size in sizes(32).items()},
        **{f"lora_te1_text_model_{TEXT.replace('.', '_')}.{end}": drawn(*size) for end, size in sizes(32).items()},
        **{f"lora_te2_text_model_{TEXT.replace('.', '_')}.{end}": drawn(*size) for end, size in sizes(24).items()},
    }
    assert set(read(tmp_path, sdxl, tensors)) == {
        ("denoiser", "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"),
        ("denoiser", "mid_block.attentions.0.transformer_blocks.1.attn1.to_q"),
        ("text_encoder", TEXT),
        ("text_encoder_2", f"text_model.{TEXT}"),
    }


def sizes(width: int) -> dict[str, tuple[int, int]]:
    return {"lora_down.weight": (2, width), "lora_up.weight": (width, 2)}


@pytest.mark.parametrize("bare", [f"base_model.model.text_model.{TEXT}.", f"base_model.model.{TEXT}."])
def test_a_bare_name_of_one_of_two_towers_is_settled_by_the_folder(sdxl: Any, tmp_path: Path, bare: str) -> None:
    tensors = {f"{bare}{end}": drawn(*size) for end, size in (("lora_A.weight", (2, 24)), ("lora_B.weight", (24, 2)))}
    with pytest.raises(layouts.LayoutError, match="1 layers that the base has not"):
        read(tmp_path, sdxl, tensors)
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 5}))
    for given in (folder, tmp_path):
        assert layouts.read(given, sdxl)["text_encoder_2", f"text_model.{TEXT}"].alpha == 5.0  # type: ignore[union-attr]


# --- written by the programs' own code


def trained(model: Any, prefix: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if prefix in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {path: m.weight.detach().clone() for path, m in model.named_modules() if hasattr(m, "weight")}  # type: ignore[union-attr]


PEFT_CONFIGS = {
    "lora": lambda: LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "conv1", "proj_in"], rank_pattern={"mid_block.*to_q": 2},
        alpha_pattern={"conv1": 7},
    ),
    "rslora": lambda: LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"], use_rslora=True),
    "dora": lambda: LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=6, target_modules=["to_q", "conv1"], use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["to_q", "conv1"], use_effective_conv2d=True),
    "lokr whole": lambda: peft.LoKrConfig(r=1000, alpha=500, decompose_factor=4, target_modules=["to_q", "conv1"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_a_folder_of_peft_is_what_peft_merges(tiny_base: Path, sd15: SD15, tmp_path: Path, kind: str) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    before = weights(unet)
    model: Any = get_peft_model(unet, PEFT_CONFIGS[kind]())
    trained(model, {"loha": "hada_", "lokr": "lokr_", "lokr whole": "lokr_"}.get(kind, "lora_"))
    model.save_pretrained(tmp_path)
    found = layouts.read(tmp_path, sd15)
    after = weights(model.merge_and_unload())
    changed = {path for path in before if not torch.equal(before[path], after[path])}
    assert changed == {path for _, path in found}
    assert len(changed) > 8
    for (_, path), update in found.items():
        expected = after[path] - before[path]
        torch.testing.assert_close(difference(update, before[path]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("told", [True, False])
def test_what_diffusers_saves_has_its_alpha_in_the_metadata(
    tiny_base: Path, sd15: SD15, tmp_path: Path, told: bool
) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k"], use_rslora=True, rank_pattern={"to_k": 2})
    pipe.unet.add_adapter(config)
    trained(pipe.unet, "lora_")
    facts = {"unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict()} if told else {}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=dict(get_peft_model_state_dict(pipe.unet)), **facts
    )
    found = layouts.read(tmp_path, sd15)
    alphas = {(path.rpartition(".")[2], update.alpha) for (_, path), update in found.items()}  # type: ignore[union-attr]
    assert alphas == ({("to_q", 12.0), ("to_k", 6 * 2**0.5)} if told else {("to_q", 4.0), ("to_k", 2.0)})


# --- LyCORIS


def test_lycoris_kernels_between_the_factors_are_exact(sd15: SD15, tmp_path: Path) -> None:
    path = "down_blocks.0.resnets.0.conv1"  # [16, 16, 3, 3]
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    w1, w2, t, t_2 = drawn(2, 2), drawn(3, 8), drawn(3, 3, 3, 3), drawn(3, 3, 3, 3, seed=9)
    a, b, c, d = (drawn(3, 16, seed=n) for n in range(4))
    rebuilt = torch.einsum("ijkl,ip,jr->prkl", t, a, b)  # lycoris.functional.general.rebuild_tucker
    second = torch.einsum("ijkl,ip,jr->prkl", t_2, c, d)
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_t1": t, "hada_w2_a": c, "hada_w2_b": d, "hada_t2": t_2}
    lokr = {"lokr_w1": w1, "lokr_w2_a": w2, "lokr_w2_b": drawn(3, 8, seed=5), "lokr_t2": t}
    small = torch.einsum("ijkl,ip,jr->prkl", t, w2, drawn(3, 8, seed=5))
    locon = {
        "lora_down.weight": a.reshape(3, 16, 1, 1),
        "lora_mid.weight": t,
        "lora_up.weight": b.T.reshape(16, 3, 1, 1),
    }
    plain = torch.einsum("mnkl,im,nj->ijkl", t, b.T, a)  # ... .tucker_weight_from_conv
    cases: dict[str, tuple[dict[str, Tensor], Tensor, type[Any]]] = {
        "loha": (loha, rebuilt * second, LohaTensors),
        "lokr": (lokr, torch.kron(w1[:, :, None, None], small.contiguous()), LokrTensors),
        "locon": (locon, plain, LoraTensors),
    }
    for ends, expected, kind in cases.values():
        tensors = {f"{name}.{end}": tensor for end, tensor in ends.items()}
        update = read(tmp_path, sd15, {**tensors, f"{name}.alpha": torch.tensor(1.5)})["denoiser", path]
        assert isinstance(update, kind)
        torch.testing.assert_close(difference(update, torch.zeros(16, 16, 3, 3)), expected / 2, rtol=1e-4, atol=1e-4)


def test_lycoris_norms_and_full_differences(sd15: SD15, tmp_path: Path) -> None:
    tensors = {
        "lora_unet_conv_norm_out.w_norm": drawn(16),
        "lora_unet_conv_norm_out.b_norm": drawn(16, seed=1),
        "lora_unet_conv_out.diff": drawn(4, 16, 3, 3),
        "lora_unet_conv_out.diff_b": drawn(4),
    }
    found = read(tmp_path, sd15, tensors)
    norm, conv = found["denoiser", "conv_norm_out"], found["denoiser", "conv_out"]
    assert isinstance(norm, Difference)
    assert torch.equal(norm.weight, drawn(16))
    assert torch.equal(norm.bias, drawn(16, seed=1))  # type: ignore[arg-type]
    assert torch.equal(conv.weight, drawn(4, 16, 3, 3))
    assert torch.equal(conv.bias, drawn(4))


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_lengths_are_of_columns_or_rows_by_their_shape(sd15: SD15, tmp_path: Path, axis: str) -> None:
    path = "down_blocks.1.resnets.0.conv1"  # [32, 16, 3, 3]
    name = "lora_unet_down_blocks_1_resnets_0_conv1"
    lengths = drawn(1, 16, 1, 1).abs() + 1 if axis == "columns" else drawn(32, 1, 1, 1).abs() + 1
    tensors = {f"{name}.lora_down.weight": drawn(2, 16, 3, 3), f"{name}.lora_up.weight": drawn(32, 2, 1, 1)}
    update = read(tmp_path, sd15, {**tensors, f"{name}.dora_scale": lengths})["denoiser", path]
    weight = drawn(32, 16, 3, 3, seed=3)
    moved = weight + (drawn(32, 2, 1, 1).flatten(1) @ drawn(2, 16, 3, 3).flatten(1)).reshape(weight.shape)
    over = (0, 2, 3) if axis == "columns" else (1, 2, 3)
    expected = lengths * moved / moved.pow(2).sum(over, keepdim=True).sqrt()  # apply_weight_decompose
    torch.testing.assert_close(weight + difference(update, weight), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(layouts.LayoutError, match="means different things to different programs"):
        read(tmp_path, sd15, {**tensors, f"{name}.dora_scale": lengths.flatten()})


# --- there and back

CONV = "attention+ff+conv"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 2.0, "ranks": {"mid_block": 2}, "alphas": {"proj_in": 3.3}, "targets": CONV},
    "rslora": {"rank": 3, "alpha": 2.0, "rank_stabilised": True},
    "dora": {"kind": "dora", "rank": 4, "alpha": 2.0, "targets": CONV},
    "dora-rows": {"kind": "dora", "rank": 4, "alpha": 2.0, "axis": "output", "targets": CONV},
    "loha": {"kind": "loha", "rank": 3, "alpha": 6.0, "targets": CONV},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 3.0, "targets": CONV},
    "lokr-whole": {"kind": "lokr", "rank": 1000, "alpha": 500.0, "factor": 4, "targets": CONV},
    "oft": {"kind": "oft", "block": 8},
    "full": {"kind": "full", "targets": "all"},
    "norms": {"kind": "full", "targets": "norm"},
}


@pytest.mark.parametrize(
    ("base", "kind"), [*(("tiny_base", kind) for kind in KINDS), ("tiny_sdxl", "lora"), ("tiny_sdxl", "dora-rows")]
)
def test_out_and_in_and_out_again_are_the_same_bits(
    request: pytest.FixtureRequest, tmp_path: Path, base: str, kind: str
) -> None:
    folder: Path = request.getfixturevalue(base)
    family_class: Any = SD15 if base == "tiny_base" else registry.load(FAMILIES, "sdxl", "model.family")
    family = family_class.load(ModelArgs(base=str(folder)), CPU)
    adapter = registry.load(ADAPTERS, KINDS[kind].get("kind", "lora"), "adapter.kind")
    part = adapter(AdapterArgs.model_validate(KINDS[kind]), 0)
    part.attach(family)
    for n, tensor in enumerate(part.state_dict().values()):
        tensor.add_(drawn(*tensor.shape, seed=n) * 0.1)
    modules = part.modules()
    part.detach()
    told = {"lora_adapter_metadata": "{}"}
    states = [(layouts.kohya_state, {})] if kind != "dora-rows" else []
    if not layouts.cannot_say("diffusers", modules, family.clients):
        told = {"lora_adapter_metadata": layouts.diffusers_metadata(modules, family.clients)}
        states.append((layouts.diffusers_state, told))
    assert states
    for state, facts in states:
        first = state(modules, family.clients)
        again = read(tmp_path, family, first, facts)
        second = state(again, family.clients)
        assert second.keys() == first.keys()
        for key, tensor in first.items():
            assert torch.equal(second[key], tensor), key
        if facts:
            assert json.loads(layouts.diffusers_metadata(again, family.clients)) == json.loads(
                facts["lora_adapter_metadata"]
            )


# --- what is wrong with a file


def test_all_that_is_not_understood_is_counted(sd15: SD15, tmp_path: Path) -> None:
    good = pair(*SPELLED["kohya"])
    name = SPELLED["kohya"][0]
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({**good, **{f"x{n}.oft_blocks": torch.ones(1) for n in range(7)}}, r"7 tensors .* x0.oft_blocks, .*x4.oft_bl"),
        ({**good, f"{name}lora_B.bias": torch.ones(32)}, r"1 tensors that are not understood: .*lora_B.bias"),
        ({**good, "bundle_emb.me.clip_l": torch.ones(2, 32)}, "embeddings inside a LoRA file are not read"),
        ({"model.diffusion_model.out.0.weight": torch.ones(2)}, "this is a whole checkpoint"),
        ({**good, "lora_unet_x.lora_up.weight": torch.ones(1)}, "1 layers that the base has not"),
        ({f"{name}lora_down.weight": torch.ones(2, 32)}, "lora_down.weight are no update that is understood"),
        ({**good, f"{name}lora_down.weight": torch.ones(4, 32)}, r"up of \[32, 3\] does not fit down of \[4, 32\]"),
        ({**good, f"{name}lora_down.weight": torch.ones(3, 31)}, r"do not fit a weight of \[32, 32\]"),
        ({**good, f"{name}lora_down.weight": torch.full((3, 32), float("nan"))}, "NaN or infinite, in .*lora_down"),
        ({**good, f"{name}alpha": torch.ones(2)}, "alpha is a tensor of"),
        ({**good, **pair(*SPELLED["cog-sdxl"])}, "under two names"),
        ({f"{name}lokr_w1": torch.ones(4, 4), f"{name}lokr_w2": torch.ones(4, 4)}, "Kronecker product .* does not fit"),
        ({**{f"{name}hada_w{n}_{e}": torch.ones(32, 3) for n in (1, 2) for e in "ab"}}, "factors .* do not fit"),
        ({f"{name}diff": torch.ones(32, 31)}, "a difference of"),
        ({f"{name}lokr_w1": torch.ones(4, 4), f"{name}dora_scale": torch.ones(1, 32)}, "of a LoRA only"),
    ]
    for tensors, said in cases:
        with pytest.raises(layouts.LayoutError, match=said):
            read(tmp_path, sd15, tensors)


def test_a_lora_for_another_base_is_told(sd15: SD15, tmp_path: Path) -> None:
    layer = "lora_unet_input_blocks_7_1_transformer_blocks_8_attn2_to_k"
    for width, name, kind in (
        (2048, layer, "Stable Diffusion XL"),
        (1024, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", "Stable Diffusion 2"),
        (3072, "lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
    ):
        tensors = {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(640, 2)}
        with pytest.raises(layouts.LayoutError, match=f"looks like one for {kind}"):
            read(tmp_path, sd15, tensors)


def test_a_folder_with_nothing_to_read_says_what_would_be(sd15: SD15, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(
        layouts.LayoutError, match=r"holds none of adapter_model.safetensors.*adapter_model.bin is a pickle"
    ):
        layouts.read(tmp_path, sd15)
    with pytest.raises(layouts.LayoutError, match="does not exist"):
        layouts.read(tmp_path / "none.safetensors", sd15)
    save_file(pair(*SPELLED["PEFT"]), tmp_path / "adapter_model.safetensors")
    for config, said in (('{"peft_type": "IA3"}', "is of a IA3, and of PEFT's kinds"), ("[]", "is no JSON object")):
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(layouts.LayoutError, match=said):
            layouts.read(tmp_path, sd15)
