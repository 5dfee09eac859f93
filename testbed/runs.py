"""Scores of a finished run: its exported files on the base, against the base alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from testbed.concepts import TRIGGER
from testbed.score import Scorer, Scores
from trainer import generate, sampler
from trainer.rundir import RunDir

STEPS, GUIDANCE = 25, 3.0


def score_run(
    root: Path,
    concept: str,
    n: int = 60,
    ordinary: int = 96,
    drawn: Callable[[int], object] = lambda _: None,
    trigger: str = TRIGGER,
) -> Scores:
    """Loads what the run exported, as a client would, and scores it.

    Args:
        trigger: that of the concept, of a run that learned several.
        drawn: told how many pictures were drawn since the last time; there are n + 2 ordinary + 8 in all.
    """
    weights = generate.located(generate.find(root))
    device = generate.device("cpu")
    learned = generate.Painter(weights, device).family
    kind: Any = type(learned)
    base = kind.load(weights.model, device)

    def draw(prompts: Sequence[str], seeds: Sequence[int], adapted: bool) -> list[Image.Image]:
        family = learned if adapted else base
        pictures: list[Image.Image] = []
        for i in range(0, len(prompts), sampler.BATCH):
            chunk, seeded = list(prompts[i : i + sampler.BATCH]), list(seeds[i : i + sampler.BATCH])
            pictures += sampler.generate(family, chunk, seeds=seeded, steps=STEPS, guidance=GUIDANCE)
            drawn(len(chunk))
        return pictures

    with torch.inference_mode():
        return Scorer(concept, training_pictures(root, trigger), trigger=trigger).score(draw, n, ordinary)


def training_pictures(root: Path, trigger: str = TRIGGER) -> list[Image.Image]:
    """The pictures that the run learned the trigger from, in its own order."""
    run = RunDir.open(root)
    lines = run.dataset.read_text(encoding="utf-8").splitlines()
    items = sorted((json.loads(line) for line in lines if line), key=lambda item: item["name"])
    own = [item for item in items if item.get("trigger", trigger) == trigger]  # older runs have one and do not say it
    return [Image.open(run.root / item["file"]).convert("RGB") for item in own]
