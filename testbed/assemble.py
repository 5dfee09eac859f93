"""Puts the fitted parts into the layout people know: diffusers folders in fp16 safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from testbed.clip import make_clip, vocabulary
from testbed.recipe import latent_scale, tokenizer_of_the_captions
from testbed.sdxl import make_sdxl_unet, second_tokenizer
from testbed.sdxl_recipe import two_towers
from testbed.text import TextTask, make_text_encoder
from testbed.unet import make_scheduler, make_unet
from testbed.vae import make_vae


def pipeline(folder: Path, unet_state: dict[str, Tensor] | None = None) -> StableDiffusionPipeline:
    """The stock pipeline around what was fitted in `folder`; `unet_state` in place of the finished denoiser."""
    unet = make_unet()
    unet.load_state_dict(unet_state or load_file(folder / "unet.safetensors"))
    return StableDiffusionPipeline(
        vae=autoencoder(folder),
        text_encoder=text_encoder(folder),
        tokenizer=tokenizer_of_the_captions(),
        unet=unet.eval(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pipeline_sdxl(folder: Path, unet_state: dict[str, Tensor] | None = None) -> StableDiffusionXLPipeline:
    """The same for SDXL's stock pipeline."""
    unet, tokenizer = make_sdxl_unet(), tokenizer_of_the_captions()
    unet.load_state_dict(unet_state or load_file(folder / "unetxl.safetensors"))
    first, second = two_towers(folder)
    return StableDiffusionXLPipeline(
        vae=autoencoder(folder),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=second_tokenizer(tokenizer),
        unet=unet.eval(),
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def autoencoder(folder: Path) -> AutoencoderKL:
    vae = make_vae()
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    vae.register_to_config(scaling_factor=round(latent_scale(folder), 5), force_upcast=False)
    return vae.eval()


def text_encoder(folder: Path) -> CLIPTextModel:
    task = TextTask(make_text_encoder(tokenizer_of_the_captions()))
    task.load_state_dict(load_file(folder / "text.safetensors"))
    return task.encoder.eval()


def assemble(folder: Path, out: Path) -> None:
    """Writes `out`/base (with clip/) and `out`/judges from what was fitted in `folder`."""
    base = out / "base"
    pipe = pipeline(folder).to(dtype=torch.float16)
    pipe.save_pretrained(base, safe_serialization=True)
    clip = make_clip(tokenizer_of_the_captions(), text_encoder(folder).state_dict())
    fitted = load_file(folder / "clip.safetensors")
    clip.load_state_dict({k.removeprefix("clip."): v for k, v in fitted.items() if k.startswith("clip.")})
    clip.half().save_pretrained(base / "clip")
    (base / "clip" / "preprocessor_config.json").write_text(json.dumps(_preprocessor(), indent=2) + "\n")
    (base / "clip" / "vocabulary.json").write_text(json.dumps(vocabulary(), indent=2) + "\n")
    for knows in ("knows", "blind"):
        state = {k: v.half() for k, v in load_file(folder / f"judge_{knows}.safetensors").items()}
        (out / "judges").mkdir(exist_ok=True)
        save_file(state, out / "judges" / f"{knows}.safetensors")
    _readable(base, out / "judges")


def assemble_sdxl(folder: Path, out: Path) -> None:
    """Writes `out`/base-sdxl from what was fitted in `folder`."""
    pipeline_sdxl(folder).to(dtype=torch.float16).save_pretrained(out / "base-sdxl", safe_serialization=True)
    _readable(out / "base-sdxl")


def _readable(*folders: Path) -> None:
    for path in (path for folder in folders for path in folder.glob("**/*.safetensors")):
        path.chmod(0o644)


def _preprocessor() -> dict[str, Any]:
    half = [0.5, 0.5, 0.5]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": 64, "width": 64},
        "do_center_crop": False,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
    }


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
