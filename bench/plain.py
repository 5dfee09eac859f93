"""A plain training script, for comparison: diffusers' models, PEFT's LoRA on attention, torch's AdamW, and one loop.

It does what the well-known example scripts do at each step: a picture is read and scaled, the VAE encodes it, the text
encoder its caption, the UNet predicts the noise. With --cached latents and text are encoded once, before the loop.

python -m bench.plain BASE PICTURES OUT [--cached] prints one line of JSON: CPU seconds to the first step's end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Plain:
    """The script's loop as an object, one optimizer update a call of `step`."""

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text: Any,
        tokenizer: Any,
        scheduler: Any,
        pictures: Sequence[tuple[Path, str]],
        *,
        resolution: int,
        batch: int,
        rank: int,
        cached: bool,
        seed: int = 0,
    ) -> None:
        self.unet, self.vae, self.text, self.tokenizer, self.scheduler = unet, vae, text, tokenizer, scheduler
        self.pictures, self.resolution, self.batch = pictures, resolution, batch
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
        self.trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.rate = get_scheduler("constant", self.optimizer)
        self.order: list[int] = []
        self.cache = [(self.latents([i]), self.hidden([i])) for i in range(len(pictures))] if cached else None

    def step(self) -> float:
        chosen = self.chosen()
        if self.cache is None:
            latents, hidden = self.latents(chosen), self.hidden(chosen)
        else:
            latents, hidden = (torch.cat(parts) for parts in zip(*(self.cache[i] for i in chosen), strict=True))
        loss = self.backward(latents, hidden)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        return loss

    def backward(self, latents: Tensor, hidden: Tensor) -> float:
        """Forward and backward alone."""
        noise = torch.randn_like(latents)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),))
        noisy = self.scheduler.add_noise(latents, noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.unet.dtype == torch.bfloat16):
            predicted = self.unet(noisy.to(self.unet.dtype), t, hidden).sample
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, t)
        loss = F.mse_loss(predicted.float(), target.float())
        loss.backward()
        return loss.item()

    def chosen(self) -> list[int]:
        while len(self.order) < self.batch:
            self.order += torch.randperm(len(self.pictures)).tolist()
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        return chosen

    @torch.no_grad()
    def latents(self, chosen: Sequence[int]) -> Tensor:
        pixels = torch.stack([self.pixels(self.pictures[i][0]) for i in chosen])
        return self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.sample().float() * self.vae.config.scaling_factor

    def pixels(self, file: Path) -> Tensor:
        with Image.open(file) as picture:
            scaled = picture.convert("RGB").resize((self.resolution, self.resolution), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(scaled, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1

    @torch.no_grad()
    def hidden(self, chosen: Sequence[int]) -> Tensor:
        captions = [self.pictures[i][1] for i in chosen]
        ids = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text(ids)[0]


def pictures(folder: Path) -> list[tuple[Path, str]]:
    """The PNGs of a folder, each with the text file beside it."""
    return [
        (file, file.with_suffix(".txt").read_text(encoding="utf-8").strip()) for file in sorted(folder.glob("*.png"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    for name, default in (("steps", 100), ("batch", 4), ("rank", 8), ("resolution", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = DTYPES[args.dtype]
    loaded: dict[str, Any] = {
        name: kind.from_pretrained(args.base, subfolder=name, dtype=dtype).eval().requires_grad_(False)
        for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel))
    }
    plain = Plain(
        loaded["unet"],
        loaded["vae"],
        loaded["text_encoder"],
        CLIPTokenizer.from_pretrained(args.base, subfolder="tokenizer"),
        DDPMScheduler.from_pretrained(args.base, subfolder="scheduler"),
        pictures(args.pictures),
        resolution=args.resolution,
        batch=args.batch,
        rank=args.rank,
        cached=args.cached,
    )
    plain.step()
    first = time.process_time()
    for _ in range(args.steps - 1):
        plain.step()
    trained: dict[str, Any] = get_peft_model_state_dict(plain.unet)
    StableDiffusionPipeline.save_lora_weights(args.out, unet_lora_layers=trained)
    print(json.dumps({"first_step_s": first}))


if __name__ == "__main__":
    main()
