"""Scores of a finished run: its exported files on the base, against the base alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from testbed.concepts import TRIGGER
from testbed.score import Scorer, Scores
from trainer import environment, generate, sampler
from trainer.args import ModelArgs
from trainer.rundir import RunDir
from trainer.types import ModelFamily

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
    weights = generate.find(root)
    model = generate.base_of([weights])
    painter = generate.Painter(model, generate.device("cpu"))
    painter.use([generate.Weighted(painter.read(weights))])
    learned = painter.family

    def draw(prompts: Sequence[str], seeds: Sequence[int], adapted: bool) -> list[Image.Image]:
        if adapted:
            return _drawn(learned, prompts, seeds, drawn)
        pictures = of_base(model.model_dump_json(), tuple(prompts), tuple(seeds))
        drawn(len(pictures))
        return list(pictures)

    with torch.inference_mode():
        return Scorer(concept, training_pictures(root, trigger), trigger=trigger).score(draw, n, ordinary)


def score_base(model: ModelArgs, concept: str, references: Sequence[Image.Image]) -> Scores:
    """The same of a base that has learned nothing; `references` are what it could have been taught with."""
    said = model.model_dump_json()

    def draw(prompts: Sequence[str], seeds: Sequence[int], adapted: bool) -> list[Image.Image]:
        return list(of_base(said, tuple(prompts), tuple(seeds)))

    with torch.inference_mode():
        return Scorer(concept, references).score(draw)


@lru_cache(maxsize=8)
def of_base(model: str, prompts: tuple[str, ...], seeds: tuple[int, ...]) -> tuple[Image.Image, ...]:
    """What the base alone draws: the same for all runs on it, so a process that scores several draws it once.

    Args:
        model: ModelArgs as JSON.
    """
    return tuple(_drawn(_base(ModelArgs.model_validate_json(model)), prompts, seeds, lambda _: None))


def _base(model: ModelArgs) -> ModelFamily:
    located = model.model_copy(update={"base": environment.located(model.base)})
    return generate.Painter(located, generate.device("cpu")).family


def _drawn(
    family: ModelFamily, prompts: Sequence[str], seeds: Sequence[int], drawn: Callable[[int], object]
) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    for i in range(0, len(prompts), sampler.BATCH):
        chunk, seeded = list(prompts[i : i + sampler.BATCH]), list(seeds[i : i + sampler.BATCH])
        pictures += sampler.generate(family, chunk, seeds=seeded, steps=STEPS, guidance=GUIDANCE)
        drawn(len(chunk))
    return pictures


def training_pictures(root: Path, trigger: str = TRIGGER) -> list[Image.Image]:
    """The pictures that the run learned the trigger from, in its own order."""
    run = RunDir.open(root)
    lines = run.dataset.read_text(encoding="utf-8").splitlines()
    items = sorted((json.loads(line) for line in lines if line), key=lambda item: item["name"])
    own = [item for item in items if item.get("trigger", trigger) == trigger]  # older runs have one and do not say it
    return [Image.open(run.root / item["file"]).convert("RGB") for item in own]
