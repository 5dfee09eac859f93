"""The card of the base of SDXL's kind: the first card's scores, and whether the six sizes are obeyed."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from numpy.typing import NDArray
from PIL import Image

from testbed import recipe, sdxl_recipe
from testbed.assemble import parameters
from testbed.card import FULL, GUIDANCE, PROMPTS, STEPS, accuracies, drawer, fitted, megabytes, psnr
from testbed.concepts import simple_scene
from testbed.judge import Judge, tensor
from testbed.pictures import Scene, caption, render
from testbed.score import base_scores, full_scores
from testbed.sdxl_recipe import SIDE

PARTS = ("text", "vae", "unet", "text2", "unetxl")  # in the order of fitting
WIDE = 96  # pixels across, of the picture that a crop is said to be from
CROPS = (0, 16, 32)  # left edges of the crop; 16 is its middle
SIDES = (20, 32, 64, 128)  # pixels, of the square picture that one is said to be made from
ASKED = 24  # prompts for each


def write_sdxl_card(work: Path, out: Path) -> None:
    """Measures what ships and writes `out`/base-sdxl/card.json and `out`/base-sdxl/README.md."""
    base = out / "base-sdxl"
    pipe = load(base)
    judge = Judge.load(out / "judges" / "knows.safetensors", True)
    facts: dict[str, Any] = {
        "warm_start": "the denoiser went on from the first base's; autoencoder and first tower are the first base's",
        "fitting": {name: fitted(work / f"{name}.safetensors") for name in PARTS},
        "samples": {"first_base": recipe.SAMPLES, "after": sdxl_recipe.SAMPLES},
        "parameters": {n: parameters(getattr(pipe, n)) for n in ("text_encoder", "text_encoder_2", "vae", "unet")},
        "megabytes": megabytes(base),
        "vae_psnr_db": round(psnr(pipe), 2),
        "prompts": PROMPTS,
        "sampler": {"steps": STEPS, "guidance": GUIDANCE},
        "base": _rounded(base_scores(drawer(pipe), judge, PROMPTS)),
        "full_prompts": _rounded(full_scores(drawer(pipe), judge, FULL)),
        "sizes": {"prompts": ASKED, "crop": crops_obeyed(pipe), "original": originals_obeyed(pipe)},
        "machine": f"{platform.machine()}, 2 processes of 1 thread, torch {torch.__version__}",
    }
    (base / "card.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    first = json.loads((out / "base" / "card.json").read_text(encoding="utf-8"))
    (base / "README.md").write_text(readme(facts, first), encoding="utf-8")


def load(base: Path) -> Any:
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def crops_obeyed(pipe: Any, n: int = ASKED, lefts: Sequence[int] = CROPS) -> dict[str, dict[str, float]]:
    """Where the thing is, in pixels from the left, by the left edge of the crop from a picture WIDE across.

    `asked` is where it is in such a crop: in the middle of the whole picture. `drawn` is the mean of n pictures.
    """
    scenes = _scenes(n)
    found: dict[str, dict[str, float]] = {}
    for left in lefts:
        pictures = _drawn(pipe, scenes, original_size=(64, WIDE), crops_coords_top_left=(0, left))
        middles = [middle(picture)[0] for picture in pictures]
        found[str(left)] = {"asked": WIDE / 2 - left, "drawn": round(float(np.mean(middles)), 1)}
    return found


def originals_obeyed(pipe: Any, n: int = ASKED, sides: Sequence[int] = SIDES) -> dict[str, dict[str, float]]:
    """Sharpness by the side of the picture that one is said to be made from; `asked` is that of such renderings,
    after the autoencoder, which softens all of them."""
    scenes, rng = _scenes(n), np.random.default_rng(31)
    found: dict[str, dict[str, float]] = {}
    for side in sides:
        whole = [render(scene, rng) for scene in scenes]
        asked = [sdxl_recipe.enlarged_from(picture, side) if side < 64 else picture for picture in whole]
        asked = through(pipe, asked)
        drawn = _drawn(pipe, scenes, original_size=(side, side), crops_coords_top_left=(0, 0))
        found[str(side)] = {
            name: round(float(np.mean([sharpness(p) for p in group])), 3)
            for name, group in (("asked", asked), ("drawn", drawn))
        }
    return found


@torch.inference_mode()
def through(pipe: Any, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures after a round trip through the autoencoder."""
    latents = pipe.vae.encode(tensor(pictures)).latent_dist.mean
    return pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pil")


def middle(picture: Image.Image) -> tuple[float, float]:
    """Centre of mass (x, y) in pixels of what differs from the background, which the frame's median is."""
    pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    weight = (np.abs(pixels - np.median(frame, 0)).max(2) > 0.25).astype(np.float32)
    total = max(float(weight.sum()), 1.0)
    y, x = np.mgrid[0 : weight.shape[0], 0 : weight.shape[1]] + 0.5
    return float((weight * x).sum() / total), float((weight * y).sum() / total)


def sharpness(picture: Image.Image) -> float:
    """The 99th percentile of differences between neighbours across, relative to the largest range of a channel."""
    pixels: NDArray[Any] = np.asarray(picture.convert("RGB"), np.float32)
    spread = float(np.ptp(pixels.reshape(-1, 3), 0).max())
    steps = np.abs(np.diff(pixels, axis=1)).max(2)
    return float(np.percentile(steps, 99)) / max(spread, 1.0)


def _drawn(pipe: Any, scenes: Sequence[Scene], **sizes: tuple[int, int]) -> list[Image.Image]:
    noise = [torch.Generator().manual_seed(40_000 + i) for i in range(len(scenes))]
    said = [caption(scene) for scene in scenes]
    return pipe(
        said, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise, target_size=(64, 64), **sizes
    ).images


def _scenes(n: int) -> list[Scene]:
    rng = np.random.default_rng(30)
    return [simple_scene(rng, sizes=False) for _ in range(n)]


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 3) for k, v in scores.items()}


def readme(facts: dict[str, Any], first: dict[str, Any]) -> str:
    """The text beside the card, from its facts and the first base's."""
    base, fitting = facts["base"], facts["fitting"]
    rows = "\n".join(f"| {name} | {f['steps']} | {f['seconds'] / 60:.1f} |" for name, f in fitting.items())
    heads = ("colour", "background", "shape", "size", "all")
    scores = "\n".join(
        f"| {name} | {' | '.join(f'{shares[head]:.3f}' for head in heads)} | {full['all']:.3f} |"
        for name, shares, full in (
            ("this", base, facts["full_prompts"]),
            ("the first", first["base"], first["full_prompts"]),
        )
    )
    shapes = ", ".join(f"{k.removeprefix('shape_')} {v:.2f}" for k, v in base.items() if k.startswith("shape_"))
    crops = "\n".join(f"| {k} | {v['asked']:.0f} | {v['drawn']:.1f} |" for k, v in facts["sizes"]["crop"].items())
    sides = "\n".join(f"| {k} | {v['asked']:.2f} | {v['drawn']:.2f} |" for k, v in facts["sizes"]["original"].items())
    edges = [facts["sizes"]["crop"][str(left)]["drawn"] for left in (CROPS[0], CROPS[-1])]
    moved = edges[0] - edges[1]
    verdict = "." if moved > (WIDE - SIDE) / 2 else ": the crop is **not** obeyed."
    return f"""# The testbed base of SDXL's kind

A folder for diffusers' StableDiffusionXLPipeline, {facts["megabytes"]} MB: two text towers, pooled text, six sizes,
64 x 64 pixels, v-prediction. Made by `python -m testbed build --base sdxl`, on the same kind of pictures as the
[first base](../base/README.md), for the same purpose.

**A warm start, not a base from nothing.** The autoencoder and the first tower are the first base's (the tower with a
third layer that adds nothing, because SDXL reads the states under the last layer). The second tower learned from
captions alone. The denoiser began as the first base's, which saw {facts["samples"]["first_base"]:,} samples, widened so
that it computed nearly the same, and saw {facts["samples"]["after"]:,} more: the first base's pictures, squares cut out
of {sdxl_recipe.SETS["cut"]:,} larger ones, {sdxl_recipe.SETS["enlarged"]:,} enlarged from smaller ones.
Machine: {facts["machine"]}, the cores shared with other work. The first three rows are the first base's.

| part | steps | minutes |
|---|---|---|
{rows}

## What it reaches

{facts["prompts"]} simple prompts and {FULL} full ones, {STEPS} steps, guidance {GUIDANCE:g}, the same prompts, seeds
and judge as for the first:

| base | colour | background | shape | size | all four | full prompts, all six |
|---|---|---|---|---|---|---|
{scores}

By shape: {shapes}.
Full prompts: {accuracies(facts["full_prompts"])}.

## Whether the sizes are obeyed

Means over {facts["sizes"]["prompts"]} prompts for one thing in the middle. "A crop of a picture {WIDE} pixels across
that begins at ...": where the thing is, in pixels from the left.

| left edge | it should be at | it is at |
|---|---|---|
{crops}

So the thing moves by {moved:.1f} of the {WIDE - SIDE} pixels that it should move by{verdict}

"Made from a picture with a side of ...": sharpness (99th percentile of differences between neighbours, relative to the
picture's range), of renderings that were treated so and went through the autoencoder, and of what it draws.

| side | renderings | drawn |
|---|---|---|
{sides}
"""
