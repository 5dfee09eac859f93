"""What the scorer can see at all: python -m bench.judges writes bench/results/judges.json.

For every held-out concept: how many ideal renderings each judge takes for it, how many of them survive a round trip
through the base's autoencoder, and how many ordinary renderings pass the blind judge.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from testbed.concepts import CONCEPTS, ordinary_scenes, training_scenes, unseen_scenes
from testbed.judge import tensor
from testbed.pictures import render
from testbed.score import HERE, Scorer
from trainer import console

OUT = Path(__file__).resolve().parent / "results" / "judges.json"
SEEDS, IDEAL, ORDINARY = (0, 1, 2), 200, 400


def main() -> int:
    console.hush_libraries()
    torch.set_num_threads(1)
    vae: Any = AutoencoderKL.from_pretrained(HERE / "base" / "vae", dtype=torch.float32).eval()
    results = {name: [measured(name, seed, vae) for seed in SEEDS] for name in CONCEPTS}
    OUT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name, runs in results.items():
        shares = {k: [run[k] for run in runs] for k in runs[0]}
        print(f"{name:9}", "  ".join(f"{k} {np.mean(v):.2f} ({min(v):.2f}..{max(v):.2f})" for k, v in shares.items()))
    return 0


def measured(name: str, seed: int, vae: Any) -> dict[str, float]:
    """Shares in 0..1 for reference pictures, ideal ones and ordinary ones of this seed."""
    concept, rng = CONCEPTS[name], np.random.default_rng((seed, 77))
    scorer = Scorer(name, [render(s, rng) for s in training_scenes(concept, 10, 5)])
    ideal = [render(s, rng) for s in unseen_scenes(concept, IDEAL, seed, scorer.seen)]
    ordinary = [render(s, rng) for s in ordinary_scenes(ORDINARY, 100 + seed)]
    shares: dict[str, float] = {}
    for kind, pictures in (("ideal", ideal), ("round_trip", round_trip(ideal, vae))):
        shares[f"knows_{kind}"] = np.mean([r[concept.kind] == concept.value for r in scorer.knows.read(pictures)])
        shares[f"blind_{kind}"] = (scorer._likeness(pictures) > scorer.threshold).float().mean().item()
    shares["blind_ordinary"] = (scorer._likeness(ordinary) > scorer.threshold).float().mean().item()
    return {k: round(float(v), 4) for k, v in shares.items()}


@torch.inference_mode()
def round_trip(pictures: list[Image.Image], vae: Any) -> list[Image.Image]:
    """The pictures encoded and decoded again."""
    again = [vae.decode(vae.encode(x).latent_dist.mean).sample for x in tensor(pictures).split(50)]
    pixels = ((torch.cat(again).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p) for p in pixels]


if __name__ == "__main__":
    sys.exit(main())
