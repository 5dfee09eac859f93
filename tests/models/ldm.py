"""Writes a tiny diffusers pipeline as one checkpoint with the names of the original code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.models.spelling import ldm_paths

State = dict[str, Tensor]
Tower = Callable[[Any], State]


def write(pipe: Any, path: Path, *towers: Tower, extra: State | None = None) -> Path:
    """`towers` write text_encoder and text_encoder_2; `extra` are more tensors."""
    unet_path = ldm_paths(pipe.unet.config)
    weights: State = dict(extra or {})
    for key, value in pipe.unet.state_dict().items():
        module, _, kind = key.rpartition(".")
        weights[f"model.diffusion_model.{unet_path(module)}.{kind}"] = value
    for key, value in pipe.vae.state_dict().items():
        attention = "mid_block.attentions" in key and value.ndim == 2
        weights[vae_name(key)] = value[:, :, None, None] if attention else value
    for tower, encoder in zip(towers, ("text_encoder", "text_encoder_2"), strict=False):
        weights |= tower(getattr(pipe, encoder))
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return path


def clip(prefix: str) -> Tower:
    """A CLIP tower, as transformers named it when these files were made."""
    return lambda encoder: {f"{prefix}text_model.{key}": value for key, value in encoder.state_dict().items()}


def open_clip(prefix: str) -> Tower:
    """An OpenCLIP tower: query, key and value in one tensor, the projection transposed."""

    def state(encoder: Any) -> State:
        found: State = {}
        own = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
        for key, value in own.items():
            if "self_attn" in key and "out_proj" not in key:
                if "q_proj" in key:
                    kind = key.rpartition(".")[2]
                    parts = [own[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                    layer = key.split(".self_attn")[0].replace("encoder.layers", "transformer.resblocks")
                    found[f"{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
                continue
            found[open_clip_name(key)] = value.T if key == "text_projection.weight" else value
        width = encoder.config.hidden_size
        return {f"{prefix}{key}": value for key, value in {"text_projection": torch.eye(width), **found}.items()}

    return state


def open_clip_name(name: str) -> str:
    for new, old in {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding": "token_embedding",
        "text_projection.weight": "text_projection",
        "final_layer_norm": "ln_final",
        "encoder.layers": "transformer.resblocks",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn": "attn",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }.items():
        name = name.replace(new, old)
    return name


def vae_name(name: str) -> str:
    """Original name of a tensor of the tiny VAE (two levels)."""
    for new, old in {
        "encoder.down_blocks.0.downsamplers.0": "encoder.down.0.downsample",
        "encoder.down_blocks.": "encoder.down.",
        "decoder.up_blocks.0.upsamplers.0": "decoder.up.1.upsample",
        "decoder.up_blocks.0.": "decoder.up.1.",
        "decoder.up_blocks.1.": "decoder.up.0.",
        ".resnets.": ".block.",
        "mid_block.block.0": "mid.block_1",
        "mid_block.block.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }.items():
        name = name.replace(new, old)
    return f"first_stage_model.{name}"
