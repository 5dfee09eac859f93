"""The names that clients know: SDXL's UNet as the original code has it, by diffusers' own conversion."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.args import ModelArgs
from trainer.models import spelling
from trainer.models.sd2 import SD2
from trainer.models.sd15 import SD15
from trainer.models.sdxl import KOHYA, SDXL
from trainer.models.weights import Weights

CPU = torch.device("cpu")
FULL_SIZE: dict[str, Any] = {  # the published config of the SDXL base
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


@pytest.fixture(scope="module")
def full_size() -> UNet2DConditionModel:
    """SDXL's UNet without its 10 GB."""
    with torch.device("meta"):
        return UNet2DConditionModel(**FULL_SIZE)


def converted_back(unet: UNet2DConditionModel) -> dict[str, str]:
    """What diffusers makes of our names, each tensor tagged with its true one."""
    path_of = spelling.ldm_paths(unet.config)
    tagged = {}
    for key in unet.state_dict():
        module, _, kind = key.rpartition(".")
        tagged[f"model.diffusion_model.{path_of(module)}.{kind}"] = key
    return convert_ldm_unet_checkpoint(tagged, unet.config)


def test_every_tensor_of_the_full_size_unet_comes_back_through_diffusers(full_size: UNet2DConditionModel) -> None:
    assert converted_back(full_size) == {key: key for key in full_size.state_dict()}


def test_every_tensor_of_the_tiny_unet_too(tiny_sdxl: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    assert converted_back(unet) == {key: key for key in unet.state_dict()}


def test_kohya_names_of_the_full_size_unet(full_size: UNet2DConditionModel) -> None:
    name = spelling.kohya(KOHYA, spelling.ldm_paths(full_size.config))
    linear = {
        path: name("denoiser", path)
        for path, module in full_size.named_modules()
        if isinstance(module, nn.Linear) and ".attentions." in path
    }
    assert len(linear) == len(set(linear.values())) == 722
    counts = {
        block: sum(key.startswith(f"lora_unet_{block}_1_") for key in linear.values())
        for block in ("input_blocks_4", "input_blocks_8", "middle_block", "output_blocks_0", "output_blocks_5")
    }
    assert counts == {  # 10 for each transformer layer, and proj_in, proj_out
        "input_blocks_4": 22,
        "input_blocks_8": 102,
        "middle_block": 102,
        "output_blocks_0": 102,
        "output_blocks_5": 22,
    }


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        ),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
            "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        ),
        ("mid_block.attentions.0.proj_in", "lora_unet_middle_block_1_proj_in"),
        ("mid_block.resnets.1.conv1", "lora_unet_middle_block_2_in_layers_2"),
        (
            "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_out.0",
            "lora_unet_output_blocks_2_1_transformer_blocks_3_attn2_to_out_0",
        ),
        ("up_blocks.2.resnets.2.conv_shortcut", "lora_unet_output_blocks_8_0_skip_connection"),
        ("down_blocks.0.resnets.1.time_emb_proj", "lora_unet_input_blocks_2_0_emb_layers_1"),
        ("down_blocks.1.downsamplers.0.conv", "lora_unet_input_blocks_6_0_op"),
        ("up_blocks.0.upsamplers.0.conv", "lora_unet_output_blocks_2_2_conv"),
        ("conv_in", "lora_unet_input_blocks_0_0"),
        ("conv_out", "lora_unet_out_2"),
        ("time_embedding.linear_2", "lora_unet_time_embed_2"),
        ("add_embedding.linear_1", "lora_unet_label_emb_0_0"),
    ],
)
def test_kohya_spellings_of_sdxl(full_size: UNet2DConditionModel, path: str, key: str) -> None:
    assert isinstance(full_size.get_submodule(path), nn.Linear | nn.Conv2d)
    assert spelling.kohya(KOHYA, spelling.ldm_paths(full_size.config))("denoiser", path) == key


SD15_UNET: dict[str, Any] = {  # the published config of Stable Diffusion 1.5, where it is not diffusers' default
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "sample_size": 64,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
# Of the sorted lines "<key> <shape of the weight>": all keys of layers that ComfyUI 0.3.64, AUTOMATIC1111 1.10 and
# Forge (June 2025) all know for a full-size model, in the spelling of docs/formats.md, as their own loaders told them.
KNOWN = {
    "sd15": (354, "5b75f81342d77dca75eb038de664bab7055614aad236cbebb478c9845a3eabe8"),
    "sdxl": (1058, "5c423a8813d2ae6b063458b382ba6e9a108ed7be08e28b2581632c61ad5610c0"),
}


@pytest.mark.parametrize("family", KNOWN)
def test_the_keys_of_full_size_models_are_those_that_the_clients_know(
    family: str, full_size: UNet2DConditionModel
) -> None:
    with torch.device("meta"):
        roots: dict[str, nn.Module] = {"text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L))}
        if family == "sd15":
            roots["denoiser"], name = UNet2DConditionModel(**SD15_UNET), SD15.clients.kohya
        else:
            big = CLIPTextConfig(**BIG_G, projection_dim=1280)
            roots |= {"denoiser": full_size, "text_encoder_2": CLIPTextModelWithProjection(big)}
            name = spelling.kohya(KOHYA, spelling.ldm_paths(full_size.config))
    lines = [
        f"{name(component, path)} {'x'.join(map(str, layer.weight.shape))}"
        for component, root in roots.items()
        for path, layer in root.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and path != "text_projection"  # which no layout has
    ]
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert (len(lines), digest) == KNOWN[family]


def test_text_towers_are_named_as_before_transformers_5() -> None:
    with torch.device("meta"):
        towers = {
            "text_encoder": CLIPTextModel(CLIPTextConfig()),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig()),
        }
    name = spelling.kohya(KOHYA)
    for (component, tower), prefix in zip(towers.items(), ("lora_te1", "lora_te2"), strict=True):
        path = next(path for path, _ in tower.named_modules() if path.endswith("layers.3.self_attn.q_proj"))
        assert name(component, path) == f"{prefix}_text_model_encoder_layers_3_self_attn_q_proj"
        assert spelling.diffusers(component, path) == f"{component}.text_model.encoder.layers.3.self_attn.q_proj"


def test_what_files_say_of_their_base(tiny_base: Path, tiny_sd2: Path, tiny_sdxl: Path) -> None:
    def said(kind: Any, base: Path, **options: str) -> tuple[str, str, dict[str, str]]:
        clients = kind.load(ModelArgs(base=str(base), **options), CPU).clients
        return clients.base_version, clients.architecture, dict(clients.facts)

    assert said(SD15, tiny_base) == ("sd_v1", "stable-diffusion-v1", {})
    assert said(SDXL, tiny_sdxl) == ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", {})
    v = {"ss_v2": "True", "ss_v_parameterization": "True"}
    assert said(SD2, tiny_sd2) == ("sd_v2_v", "stable-diffusion-v2-768-v", v)
    assert said(SD2, tiny_sd2, prediction="epsilon") == ("sd_v2", "stable-diffusion-v2-512", {"ss_v2": "True"})


def test_the_upsampler_of_a_block_without_attention_comes_second(tiny_sd2: Path) -> None:
    """As in the single files of SD1.5 and 2: output_blocks.2.1.conv there."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sd2, subfolder="unet")
    path = "up_blocks.0.upsamplers.0.conv"
    assert isinstance(unet.get_submodule(path), nn.Conv2d)
    assert spelling.ldm_paths(unet.config)(path) == "output_blocks.1.1.conv"


def test_a_digest_is_of_the_config_too(tiny_sd2: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_sd2, subfolder="unet")

    def digest(**config: object) -> str:
        weights = Weights()
        weights.remember("denoiser", unet, {**unet.config, **config})
        return weights.digest("denoiser")

    assert digest() == digest(_name_or_path="elsewhere") != digest(sample_size=8)
