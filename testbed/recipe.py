"""The recipe: what is fitted, in which order, on which pictures, for how long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from testbed.fit import Task
from testbed.pictures import OPENINGS, caption, draw_scene, render
from testbed.text import TextTask, make_text_encoder, make_tokenizer, spoken, text_batch, tokens
from testbed.unet import ALL_SHARES, PLAIN_SHARES, make_scheduler, make_unet, timesteps, v_loss
from testbed.vae import make_vae, vae_loss

SEED = 7
BATCH = 24  # in each of two processes
PLAIN_SAMPLES = 72_000
SAMPLES = 440_000
DECAY_SAMPLES = 160_000
# name: (pictures, width, height, plain)
SETS = {
    "plain": (12_000, 64, 64, True),
    "all": (64_000, 64, 64, False),
    "wide": (5_000, 80, 48, False),
    "tall": (5_000, 48, 80, False),
}


def tokenizer_of_the_captions() -> Any:
    rng = np.random.default_rng(SEED)
    return make_tokenizer([caption(draw_scene(rng), OPENINGS[i % 3]) for i in range(5000)])


def make_pictures(folder: Path, name: str) -> None:
    """Renders a set to `<name>.pixels.npy` [N, H, W, 3] uint8, token ids to `<name>.ids.npy` [N, L]."""
    count, width, height, plain = SETS[name]
    rng = np.random.default_rng((SEED, *name.encode()))
    pixels = np.lib.format.open_memmap(folder / f"{name}.tmp.npy", "w+", np.uint8, (count, height, width, 3))
    said: list[str] = []
    for i in range(count):
        scene = draw_scene(rng, plain=plain)
        pixels[i] = np.asarray(render(scene, rng, width, height))
        said.append(spoken(scene, rng, unknown=0.04)[0])
    pixels.flush()
    np.save(folder / f"{name}.ids.npy", tokens(tokenizer_of_the_captions(), said).numpy().astype(np.int16))
    (folder / f"{name}.tmp.npy").replace(folder / f"{name}.pixels.npy")


def as_input(pixels: np.ndarray[Any, Any]) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Text(Task):
    name, steps, lr, decay_steps, weight_decay, seed = "text", 700, 2e-3, 500, 0.01, SEED

    def model(self) -> nn.Module:
        self.tokenizer = tokenizer_of_the_captions()
        return TextTask(make_text_encoder(self.tokenizer))

    def loss(self, model: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        ids, target = text_batch(self.tokenizer, [draw_scene(rng) for _ in range(64)], rng)
        loss, right = model(ids, target, torch.Generator().manual_seed(int(rng.integers(2**31))))
        return loss, {"right": float(right)}


class Vae(Task):
    name, steps, lr, decay_steps, ema, seed = "vae", 1050, 2.5e-3, 550, 0.99, SEED

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self) -> nn.Module:
        return make_vae()

    def prepare(self, rank: int) -> None:
        self.pixels = np.load(self.folder / "all.pixels.npy", mmap_mode="r")

    def loss(self, model: Any, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        x = as_input(self.pixels[np.sort(rng.integers(0, len(self.pixels) - 500, 16))])
        with torch.autocast("cpu", torch.bfloat16):
            loss, mse = vae_loss(model, x)
        return loss, {"psnr": float(10 * torch.log10(4 / mse))}


def make_latents(folder: Path, name: str) -> None:
    """`<name>.latents.npy` [N, 4, h, w] fp16: unscaled posterior means of the fitted autoencoder."""
    vae = make_vae()
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    vae.eval()
    pixels = np.load(folder / f"{name}.pixels.npy", mmap_mode="r")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        parts = [
            vae.encode(as_input(pixels[i : i + 100])).latent_dist.mean.half().numpy()
            for i in range(0, len(pixels), 100)
        ]
    np.save(folder / f"{name}.latents.tmp.npy", np.concatenate(parts))
    (folder / f"{name}.latents.tmp.npy").replace(folder / f"{name}.latents.npy")


def latent_scale(folder: Path) -> float:
    """The factor that brings the latents of all pictures to unit standard deviation."""
    return 1 / float(np.load(folder / "all.latents.npy", mmap_mode="r")[:4000].astype(np.float32).std())


class UNet(Task):
    """Plain pictures first: on mixed ones from the start, shapes are not learned in this time."""

    name, lr, warmup, ema, seed = "unet", 1.5e-3, 100, 0.999, SEED
    steps, decay_steps = SAMPLES // (2 * BATCH), DECAY_SAMPLES // (2 * BATCH)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self) -> nn.Module:
        return make_unet()

    def prepare(self, rank: int) -> None:
        tokenizer = tokenizer_of_the_captions()
        task = TextTask(make_text_encoder(tokenizer))
        task.load_state_dict(load_file(self.folder / "text.safetensors"))
        self.encoder = task.encoder.eval()
        self.empty = tokens(tokenizer, [""])[0]
        self.scale = latent_scale(self.folder)
        self.sets = {
            n: (np.load(self.folder / f"{n}.latents.npy"), np.load(self.folder / f"{n}.ids.npy")) for n in SETS
        }
        self.alphas = make_scheduler().alphas_cumprod

    def loss(self, model: Any, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        plain = step * 2 * BATCH < PLAIN_SAMPLES
        # the set is drawn from the step alone, so that both processes take as long
        chance = np.random.default_rng((self.seed, step)).random()
        name = "plain" if plain or chance < 0.12 else "wide" if chance < 0.16 else "tall" if chance < 0.20 else "all"
        latents, ids = self.sets[name]
        rows = rng.integers(0, len(latents), BATCH)
        x0 = torch.from_numpy(latents[rows]).float() * self.scale
        said = torch.from_numpy(ids[rows]).long()
        said[torch.from_numpy(rng.random(BATCH) < 0.1)] = self.empty
        with torch.no_grad():
            hidden = self.encoder(said).last_hidden_state
        t = timesteps(rng, BATCH, PLAIN_SHARES if plain else ALL_SHARES)
        return v_loss(model, self.alphas, x0, hidden, t), {}
