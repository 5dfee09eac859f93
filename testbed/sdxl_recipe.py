"""What is fitted for the base of SDXL's kind: a second tower on captions, then the first base's denoiser further.

Two sets of pictures are there for the six sizes: cut out of larger pictures, and enlarged from smaller ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from testbed.fit import Task
from testbed.pictures import Rng, draw_scene, render
from testbed.recipe import SEED, latent_scale, tokenizer_of_the_captions
from testbed.sdxl import (
    SecondTask,
    first_tower,
    make_sdxl_unet,
    make_second_tower,
    norm_as_matrix,
    second_tokenizer,
    widened,
)
from testbed.text import TextTask, make_text_encoder, spoken, text_batch, tokens
from testbed.unet import ALL_SHARES, make_scheduler, timesteps, v_loss

SIDE = 64
SIDE_OF_LATENT = 4  # pixels
BATCH = 12  # in each of two processes
SAMPLES = 20_016
DECAY_SAMPLES = 6_000
SETS = {"cut": 12_000, "enlarged": 6_000}  # beside the first base's
# Square pictures share a batch: what the sizes change is seen best beside what they leave alone.
SQUARE = {"all": 0.36, "cut": 0.38, "enlarged": 0.18, "plain": 0.08}
OBLONG = {"wide": 0.04, "tall": 0.04}  # shares of the steps
EMPTY, ZEROS = 0.05, 0.05  # shares of captions left out: as "", and as SDXL's zeros


def make_pictures(folder: Path, name: str) -> None:
    """Renders a set: pixels and ids as `recipe.make_pictures`, and the six sizes as `<name>.sizes.npy` [N, 6]."""
    rng = np.random.default_rng((SEED, *name.encode()))
    pixels = np.empty((SETS[name], SIDE, SIDE, 3), np.uint8)
    sizes = np.empty((SETS[name], 6), np.int16)
    said: list[str] = []
    for i in range(len(pixels)):
        scene = draw_scene(rng)
        picture, sizes[i] = cut(scene, rng) if name == "cut" else enlarged(scene, rng)
        pixels[i] = np.asarray(picture)
        said.append(spoken(scene, rng, unknown=0.04)[0])
    np.save(folder / f"{name}.ids.npy", tokens(tokenizer_of_the_captions(), said).numpy().astype(np.int16))
    np.save(folder / f"{name}.sizes.npy", sizes)
    np.save(folder / f"{name}.tmp.npy", pixels)
    (folder / f"{name}.tmp.npy").replace(folder / f"{name}.pixels.npy")


def cut(scene: Any, rng: Rng) -> tuple[Image.Image, tuple[int, ...]]:
    """A square out of a larger picture, anywhere in it; (picture, sizes)."""
    short = SIDE if rng.random() < 0.5 else int(rng.integers(SIDE + 1, 81))
    long = short if rng.random() < 0.25 else int(rng.integers(short + 6, short * 3 // 2 + 1))
    width, height = (long, short) if rng.random() < 0.5 else (short, long)
    left, top = (int(rng.integers(0, side - SIDE + 1)) for side in (width, height))
    picture = render(scene, rng, width, height).crop((left, top, left + SIDE, top + SIDE))
    scale = SIDE / short  # the original was smaller: it covers the square, or a part of it does
    return picture, (round(height * scale), round(width * scale), top, left, SIDE, SIDE)


def enlarged(scene: Any, rng: Rng) -> tuple[Image.Image, tuple[int, ...]]:
    """A picture that had fewer pixels, and shows it; (picture, sizes)."""
    side = int(rng.integers(16, 57))
    return enlarged_from(render(scene, rng, SIDE, SIDE), side), (side, side, 0, 0, SIDE, SIDE)


def enlarged_from(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


def two_towers(folder: Path) -> tuple[Any, Any]:
    """The first base's tower as SDXL's first, and the second one, from what was fitted in `folder`."""
    tokenizer = tokenizer_of_the_captions()
    first, second = TextTask(make_text_encoder(tokenizer)), SecondTask(make_second_tower(second_tokenizer(tokenizer)))
    first.load_state_dict(load_file(folder / "text.safetensors"))
    second.load_state_dict(load_file(folder / "text2.safetensors"))
    return first_tower(first.encoder), second.encoder.eval()


class Text2(Task):
    name, steps, lr, decay_steps, weight_decay, seed = "text2", 480, 2e-3, 280, 0.01, SEED + 1

    def model(self) -> nn.Module:
        self.tokenizer = second_tokenizer(tokenizer_of_the_captions())
        return SecondTask(make_second_tower(self.tokenizer))

    def loss(self, model: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        ids, target = text_batch(self.tokenizer, [draw_scene(rng) for _ in range(64)], rng)
        loss, right = model(ids, target, torch.Generator().manual_seed(int(rng.integers(2**31))))
        return loss, {"right": float(right)}


class UNetXL(Task):
    """The first base's denoiser, widened, goes on: from nothing, shapes take most of an hour."""

    name, lr, warmup, ema, seed = "unetxl", 7e-4, 100, 0.997, SEED + 1
    steps, decay_steps = SAMPLES // (2 * BATCH), DECAY_SAMPLES // (2 * BATCH)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self) -> nn.Module:
        unet = make_sdxl_unet()
        tower, _ = two_towers(self.folder)
        ids = torch.from_numpy(np.load(self.folder / "all.ids.npy", mmap_mode="r")[:1500].astype(np.int64))
        unet.load_state_dict(widened(load_file(self.folder / "unet.safetensors"), norm_as_matrix(tower, ids)))
        return unet

    def prepare(self, rank: int) -> None:
        self.towers = two_towers(self.folder)
        tokenizer = tokenizer_of_the_captions()
        self.empty = tokens(tokenizer, [""])[0]
        self.pads = tokenizer.pad_token_id, second_tokenizer(tokenizer).pad_token_id
        self.eos = tokenizer.eos_token_id
        self.scale = latent_scale(self.folder)
        self.sets = {
            name: (np.load(self.folder / f"{name}.latents.npy"), np.load(self.folder / f"{name}.ids.npy"))
            for name in (*SQUARE, *OBLONG)
        }
        self.sizes = {name: np.load(self.folder / f"{name}.sizes.npy") for name in SETS}
        self.alphas = make_scheduler().alphas_cumprod

    def loss(self, model: Any, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        # the shape is drawn from the step alone, so that both processes take as long
        chance = np.random.default_rng((self.seed, step)).random()
        oblong = "wide" if chance < OBLONG["wide"] else "tall" if chance < sum(OBLONG.values()) else None
        names = [oblong] * BATCH if oblong else rng.choice(list(SQUARE), BATCH, p=list(SQUARE.values())).tolist()
        drawn = [self._picture(name, rng) for name in names]
        latents, ids, sizes = (np.stack(part) for part in zip(*drawn, strict=True))
        x0 = torch.from_numpy(latents).float() * self.scale
        said = torch.from_numpy(ids).long()
        fate = torch.from_numpy(rng.random(BATCH))
        said[fate < EMPTY] = self.empty
        hidden, pooled = self._encoded(said)
        zeros = fate > 1 - ZEROS
        hidden[zeros], pooled[zeros] = 0.0, 0.0
        t = timesteps(rng, BATCH, ALL_SHARES)
        added = {"text_embeds": pooled, "time_ids": torch.from_numpy(sizes).float()}
        return v_loss(model, self.alphas, x0, hidden, t, added), {}

    @torch.no_grad()
    def _encoded(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden [B, L, D1 + D2] and pooled [B, P] states, for ids padded as the first tokenizer pads."""
        after = (ids == self.eos).int().cumsum(1).cumsum(1) > 1  # the first end is the text's own
        outs = [
            tower(ids.masked_fill(after, pad), output_hidden_states=True)
            for tower, pad in zip(self.towers, self.pads, strict=True)
        ]
        return torch.cat([out.hidden_states[-2] for out in outs], 2), outs[1].text_embeds

    def _picture(self, name: str, rng: Rng) -> tuple[Any, Any, Any]:
        """(latents, ids, sizes) of one; a third of the whole ones say that they were larger, which leaves no trace."""
        latents, ids = self.sets[name]
        row = int(rng.integers(len(latents)))
        if name in self.sizes:
            return latents[row], ids[row], self.sizes[name][row].astype(np.int64)
        height, width = (SIDE_OF_LATENT * side for side in latents.shape[2:])
        factor = float(rng.uniform(1, 4)) if rng.random() < 0.33 else 1.0
        return latents[row], ids[row], np.array([round(height * factor), round(width * factor), 0, 0, height, width])
