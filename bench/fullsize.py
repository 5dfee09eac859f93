"""Bases of full size with random weights, built in memory: what a step costs does not depend on what they say.

`--model.family bench.fullsize:SD15` and `:SDXL` are families like any other; `model.base` lends its tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from trainer.args import ModelArgs
from trainer.models import load, sd15, sdxl
from trainer.models.latent import LatentFamily
from trainer.models.parts import Parts, tokenizer_of
from trainer.models.skeleton import PUBLISHED

_F = TypeVar("_F", bound=LatentFamily)
BASE = "testbed/base"  # lends its tokenizer
LENGTH = 77  # tokens of a prompt
SEED = 0
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SDXL_SIZES = PUBLISHED["sdxl"]
TOWERS_XL = (SDXL_SIZES["text_encoder"], {**SDXL_SIZES["text_encoder_2"], "hidden_act": "gelu"})


class SD15(sd15.SD15):
    """860 million weights in the UNet, 84 in the VAE, about 85 in the text tower."""

    @classmethod
    def load(cls, args: ModelArgs, device: torch.device) -> Self:
        unet = {"cross_attention_dim": 768, "sample_size": 64}
        return _arranged(
            cls(_parts(args, device, cls, unet, (PUBLISHED["sd15"]["text_encoder"],), 0.18215)), args, device
        )


class SDXL(sdxl.SDXL):
    """2.6 thousand million weights in the UNet, 84 million in the VAE, about 85 and 635 in the text towers."""

    @classmethod
    def load(cls, args: ModelArgs, device: torch.device) -> Self:
        return _arranged(cls(_parts(args, device, cls, SDXL_SIZES["unet"], TOWERS_XL, 0.13025)), args, device)


def written(kind: type[LatentFamily], dtype: str, folder: Path) -> None:
    """The same as a diffusers folder, which is read as people's bases are: mapped from its files.

    Args:
        kind: SD15 or SDXL.
    """
    family = kind.load(ModelArgs.model_validate({"base": BASE, "dtype": dtype, "packed": "off"}), torch.device("cpu"))
    folder.mkdir(parents=True)
    family.save_settings(folder)
    for name, tensors in family.folder(family.tensors()).items():
        save_file(tensors, folder / name, {"format": "pt"})


def _arranged(family: _F, args: ModelArgs, device: torch.device) -> _F:
    """As a family's own `load` ends."""
    family.arrange(args, device)
    return family


def _parts(
    args: ModelArgs,
    device: torch.device,
    family: type[LatentFamily],
    unet: Mapping[str, Any],
    widths: tuple[Mapping[str, Any], ...],
    scaling: float,
) -> Parts:
    dtype = load.DTYPES[args.dtype]
    tokenizers = {name: _tokenizer(args.base, name) for name in family.towers}
    towers: dict[str, Any] = {}
    with torch.device("meta"):
        denoiser: Any = UNet2DConditionModel(**unet)
        vae: Any = AutoencoderKL(**VAE, scaling_factor=scaling, sample_size=8 * denoiser.config.sample_size)  # pyright: ignore[reportArgumentType]
        for (name, kind), sizes in zip(family.towers.items(), widths, strict=True):
            towers[name] = kind(CLIPTextConfig(**sizes, **_vocabulary(tokenizers[name])))
    for part in (denoiser, vae, *towers.values()):
        fill(part, dtype, device)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return Parts(tokenizers, towers, vae, denoiser, scheduler, {})


def _tokenizer(base: str, tower: str) -> Any:
    """The base's own, or its first one, for prompts of the usual length."""
    there = tokenizer_of(tower) if (Path(base) / tokenizer_of(tower)).is_dir() else "tokenizer"
    tokenizer: Any = load.settings(CLIPTokenizer, base, there, None)
    tokenizer.model_max_length = LENGTH
    return tokenizer


def _vocabulary(tokenizer: Any) -> dict[str, Any]:
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, **special}


@torch.no_grad()
def fill(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a module that was built on `meta` weights of usual size: drawn once and repeated, which takes seconds."""
    drawn = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            filled = torch.full(parameter.shape, float(name == "weight"), dtype=dtype)
            if parameter.ndim > 1:
                scale = 1 / math.sqrt(parameter[0].numel())
                for part in filled.view(-1).split(len(drawn)):
                    part.copy_(drawn[: len(part)]).mul_(scale)
            setattr(owner, name, nn.Parameter(filled.to(device)))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if name != "position_ids":
                raise ValueError(f"{type(owner).__name__} has a buffer {name}, which nobody filled")
            setattr(owner, name, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
