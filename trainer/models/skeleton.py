"""The layers of a family without their weights: names and shapes, for tools that read files and draw nothing.

Modules are built on torch's meta device, which holds no numbers, from the configs that a base was published with or
that a diffusers folder has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.args import ModelArgs
from trainer.models import load, sniff, spelling
from trainer.models.sd2 import SD2
from trainer.models.sd15 import SD15
from trainer.models.sdxl import SDXL
from trainer.types import ClientNames

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
# What differs from the defaults of diffusers and transformers, which are Stable Diffusion 1's and CLIP's.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {"unet": {"cross_attention_dim": 768}, "text_encoder": _CLIP_L},
    "sd2": {
        "unet": {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "text_encoder": _CLIP_H,
    },
    "sdxl": {
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "text_encoder": _CLIP_L,
        "text_encoder_2": {**_CLIP_G, "projection_dim": 1280},
    },
}
_CLASSES = {"sd15": SD15, "sd2": SD2, "sdxl": SDXL}
_TOWERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


class Skeleton:
    """Layers of a family by component, and their names in files. Forward passes are not possible."""

    def __init__(self, name: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Args: configs: of "unet" and of each text encoder, as config.json has them."""
        self.name = name
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(dict(configs["unet"]))
            self.denoiser: nn.Module = unet
            self.text_encoders: dict[str, nn.Module] = {
                part: kind(CLIPTextConfig(**configs[part])) for part, kind in _TOWERS.items() if part in configs
            }
        self.original_path = spelling.ldm_paths(unet.config)
        self.clients: ClientNames = _CLASSES[name].named(unet.config)
        self.original_towers = _CLASSES[name].original_towers

    def spellings(self, component: str, path: str) -> Sequence[str]:
        """As `LatentFamily.spellings`."""
        return spelling.others(component, path, self.original_path)


def published(name: str) -> Skeleton:
    """Of the base that a family's name stands for: sd15, sd2 or sdxl."""
    return Skeleton(name, PUBLISHED[name])


def of_base(base: str, config: str | None = None) -> Skeleton:
    """Of a base on disk: a diffusers folder by its configs, a single file as published or as `config` says.

    Args:
        config: the diffusers folder whose configs a single file has.

    Raises:
        BaseModelError: it is neither, or of no family.
    """
    args = sniff.named(ModelArgs.model_validate({"base": base}))
    folder = config if load.is_single_file(base) else base
    if folder is None:
        return published(args.family)
    parts = ["unet", *(part for part in PUBLISHED[args.family] if part != "unet")]
    return Skeleton(args.family, {part: load.settings_of(folder, f"{part}/config.json", None) for part in parts})


def is_family(name: str) -> bool:
    """Whether it is a family's name and no path."""
    return name in PUBLISHED and not Path(name).exists()
