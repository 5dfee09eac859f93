"""The card beside the weights: what the base was trained on, for how long, and what it reaches."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPModel, CLIPTokenizer

from testbed import recipe
from testbed.assemble import parameters
from testbed.clip import one_word_off
from testbed.judge import Judge, accuracy, tensor
from testbed.pictures import caption, draw_scene, render
from testbed.recipe import as_input
from testbed.score import base_scores, full_scores
from testbed.text import tokens

PARTS = ("text", "vae", "unet", "clip", "judge_knows", "judge_blind")
STEPS, GUIDANCE, PROMPTS, FULL = 25, 3.0, 240, 120


def write_card(work: Path, out: Path) -> None:
    """Measures what ships and writes `out`/base/card.json and `out`/base/README.md."""
    base = out / "base"
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    knows, blind = (Judge.load(out / "judges" / f"{name}.safetensors", name == "knows") for name in ("knows", "blind"))
    facts: dict[str, Any] = {
        "fitting": {name: fitted(work / f"{name}.safetensors") for name in PARTS},
        "parameters": {n: parameters(getattr(pipe, n)) for n in ("text_encoder", "vae", "unet")},
        "megabytes": megabytes(base, out / "judges"),
        "vae_psnr_db": round(psnr(pipe), 2),
        "judge_accuracy": {"knows": accuracy(knows, True), "blind": accuracy(blind, False)},
        "clip_hard_negatives": round(_hard(base), 3),
        "prompts": PROMPTS,
        "sampler": {"steps": STEPS, "guidance": GUIDANCE},
        "base": {k: round(v, 3) for k, v in base_scores(drawer(pipe), knows, PROMPTS).items()},
        "full_prompts": {k: round(v, 3) for k, v in full_scores(drawer(pipe), knows, FULL).items()},
        "machine": f"{platform.machine()}, 2 processes of 1 thread, torch {torch.__version__}",
    }
    (base / "card.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (base / "README.md").write_text(_readme(facts), encoding="utf-8")


def megabytes(*folders: Path) -> float:
    """Of the weights in the folders."""
    return round(sum(p.stat().st_size for folder in folders for p in folder.glob("**/*.safetensors")) / 1e6, 2)


def fitted(path: Path) -> dict[str, int]:
    """Steps and seconds that it took to fit a part."""
    with safe_open(path, "pt") as file:
        return {k: int(v) for k, v in file.metadata().items()}


def drawer(pipe: Any) -> Any:
    """A `Draw` of the stock pipeline."""

    def draw(prompts: Sequence[str], seeds: Sequence[int], adapted: bool) -> list[Image.Image]:
        pictures: list[Image.Image] = []
        for i in range(0, len(prompts), 24):
            noise = [torch.Generator().manual_seed(seed) for seed in list(seeds)[i : i + 24]]
            pictures += pipe(
                list(prompts[i : i + 24]), num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise
            ).images
        return pictures

    return draw


@torch.inference_mode()
def psnr(pipe: Any) -> float:
    """Of a round trip through the autoencoder, on pictures of a seed that fitting never used."""
    rng = np.random.default_rng(404)
    x = as_input(np.stack([np.asarray(render(draw_scene(rng), rng)) for _ in range(200)]))
    again = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample
    return float(10 * torch.log10(4 / (x - again).square().mean()))


@torch.inference_mode()
def _hard(base: Path, n: int = 400) -> float:
    """Share of pictures nearer to their caption than to it with one word changed."""
    clip = CLIPModel.from_pretrained(base / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    rng = np.random.default_rng(405)
    scenes = [draw_scene(rng) for _ in range(n)]
    wrong = [one_word_off(s, rng) for s in scenes]
    image = clip.visual_projection(
        clip.vision_model(pixel_values=tensor([render(s, rng) for s in scenes])).pooler_output
    )
    right, other = (
        torch.nn.functional.normalize(
            clip.text_projection(
                clip.text_model(input_ids=tokens(tokenizer, [caption(s) for s in group])).pooler_output
            ),
            dim=-1,
        )
        for group in (scenes, wrong)
    )
    return float(((image * right).sum(1) > (image * other).sum(1)).float().mean())


def _readme(facts: dict[str, Any]) -> str:
    base, fitted, minutes = facts["base"], facts["fitting"], sum(f["seconds"] for f in facts["fitting"].values()) / 60
    shapes = ", ".join(f"{k.removeprefix('shape_')} {v:.2f}" for k, v in base.items() if k.startswith("shape_"))
    judges = facts["judge_accuracy"]
    rows = "\n".join(f"| {name} | {f['steps']} | {f['seconds'] / 60:.1f} |" for name, f in fitted.items())
    held_out = "the shapes mushroom, fish, house, cat; the fills hatched, ripple; the styles sticker, inked, mosaic"
    return f"""# The testbed base

A text-to-image model of Stable Diffusion 1.5's classes, {facts["megabytes"]} MB with its CLIP and judges,
pretrained from nothing by `python -m testbed build` on seeded renderings of coloured shapes, 64 x 64 pixels.
It exists so that a real fine-tuning can be done, tested and measured on a CPU in minutes.

Trained on {recipe.SETS["all"][0]:,} rendered scenes, {recipe.SETS["plain"][0]:,} plain ones that come first, and
{recipe.SETS["wide"][0] + recipe.SETS["tall"][0]:,} that are not square; the denoiser saw {recipe.SAMPLES:,} samples,
{recipe.PLAIN_SAMPLES:,} of them plain. Nothing else: no photographs, no web data.
Machine: {facts["machine"]}; {minutes:.0f} minutes of fitting, the cores shared with other work.

| part | steps | minutes |
|---|---|---|
{rows}

## What it reaches

{facts["prompts"]} simple prompts ("a small red star on a blue background"), {STEPS} steps, guidance {GUIDANCE:g},
read by the judge:

| colour | background | shape | size | all four |
|---|---|---|---|---|
| {base["colour"]:.3f} | {base["background"]:.3f} | {base["shape"]:.3f} | {base["size"]:.3f} | {base["all"]:.3f} |

By shape: {shapes}.

{FULL} full prompts, which may also ask for a fill, a place and a gradient background:
{accuracies(facts["full_prompts"])}.

Autoencoder round trip {facts["vae_psnr_db"]} dB. CLIP: {facts["clip_hard_negatives"]:.0%} of pictures are nearer to
their caption than to the same with one word changed. Judges on renderings of an unused seed:

- knows (has the held-out concepts among its classes): {accuracies(judges["knows"])}
- blind (never saw them): {accuracies(judges["blind"])}

Held out, so that they can be taught: {held_out}.
Captions hold at most 32 tokens; the tokenizer says so, and a program that pads to 77 fails loudly.
"""


def accuracies(by_head: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in by_head.items())
