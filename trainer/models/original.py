"""A family's tensors under the names of the original code (LDM, sgm): what single-file checkpoints are made of.

They are checked by diffusers' own conversion of such files, in the other direction.
Shapes: D width of a text tower.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trainer.models.spelling import client_path

State = Mapping[str, Tensor]
Tower = Callable[[State], dict[str, Tensor]]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# In this order: a name is changed by every rule that fits it.
VAE_RULES = (
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".up.\1.block.\2."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
OPEN_CLIP = (
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding", "token_embedding"),
    ("text_projection.weight", "text_projection"),
    ("final_layer_norm", "ln_final"),
    ("encoder.layers", "transformer.resblocks"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
FUSED = re.compile(r"(?P<layer>.*)\.self_attn\.(?P<which>[qkv])_proj\.(?P<kind>weight|bias)")


def unet(state: State, path_of: Callable[[str], str]) -> dict[str, Tensor]:
    """`path_of` gives the original path of a module, see `spelling.ldm_paths`."""
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        named[f"{UNET}{path_of(module)}.{kind}"] = tensor
    return named


def vae(state: State, levels: int) -> dict[str, Tensor]:
    """Linear layers of its attention are convolutions of one pixel there, and its way up is counted from the top."""
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = f".{key}"
        for pattern, to in VAE_RULES:
            name = re.sub(pattern, to, name)
        name = re.sub(r"^\.decoder\.up\.(\d+)", lambda found: f".decoder.up.{levels - 1 - int(found[1])}", name)
        flat = ".attn_1." in name and tensor.ndim == 2
        named[f"{VAE}{name[1:]}"] = tensor[:, :, None, None] if flat else tensor
    return named


def clip(prefix: str) -> Tower:
    """A CLIP tower as transformers named it when these files were made."""
    return lambda state: {f"{prefix}{client_path(key)}": tensor for key, tensor in state.items()}


def open_clip(prefix: str) -> Tower:
    """An OpenCLIP tower: query, key and value in one tensor, the projection (if it has one) transposed."""

    def named(state: State) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        own = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        for key, tensor in own.items():
            fused = FUSED.fullmatch(key)
            if fused is None:
                found[prefix + _open_clip_name(key)] = tensor.T if key == "text_projection.weight" else tensor
            elif fused["which"] == "q":
                parts = [own[f"{fused['layer']}.self_attn.{which}_proj.{fused['kind']}"] for which in "qkv"]
                found[f"{prefix}{_open_clip_name(fused['layer'])}.attn.in_proj_{fused['kind']}"] = torch.cat(parts)
        return found

    return named


def _open_clip_name(name: str) -> str:
    for ours, theirs in OPEN_CLIP:
        name = name.replace(ours, theirs)
    return name
