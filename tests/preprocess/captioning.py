"""What the tests of captioners share: options, pictures that have no caption, a small vocabulary."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocess import Item
from testbed.judge import one_thing
from testbed.pictures import Scene, render
from trainer.args import CaptionModelArgs, DataArgs

ROOT = Path(__file__).parents[2]

CLIP = ROOT / "testbed/base/clip"


def data(**options: Any) -> DataArgs:
    return DataArgs.model_validate({"source": "", **options})


def clip_data(**model: Any) -> DataArgs:
    return data(captioner="clip", caption_model={"device": "cpu", **model})


def options(**model: Any) -> CaptionModelArgs:
    return CaptionModelArgs.model_validate({"device": "cpu", **model})


def item(folder: Path, picture: Image.Image, name: str, **known: Any) -> Item:
    file = folder / f"{name}.png"
    picture.save(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Item(name, file.name, digest, picture.width, picture.height, f"{name}.png", **known)


def uncaptioned(folder: Path, count: int, seed: int) -> tuple[list[Scene], list[Item]]:
    rng = np.random.default_rng(seed)
    scenes = [one_thing(rng, knows=False) for _ in range(count)]
    return scenes, [item(folder, render(scene, rng, 64 + 16 * (i % 2)), f"p{i}") for i, scene in enumerate(scenes)]


def few_words(folder: Path) -> Path:
    """A vocabulary that takes little time."""
    file = folder / "words.json"
    slots = {"c": ["red", "blue"], "b": ["white", "orange"]}
    file.write_text(json.dumps({"compare": "a {c} star on a {b} background", "slots": slots}))
    return file
