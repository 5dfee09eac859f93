"""The held-out concepts as a person would bring them: a few captioned pictures, and prompts to judge by."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from testbed.pictures import (
    COLOURS,
    HELD_OUT_FILLS,
    HELD_OUT_STYLES,
    SIZES,
    Rng,
    Scene,
    Thing,
    caption,
    render,
)
from testbed.shapes import HELD_OUT_SHAPES, SHAPES

TRIGGER = "TOK"


@dataclass(frozen=True)
class Concept:
    """`kind` is the head of the judge that sees it, `value` its class."""

    kind: Literal["shape", "fill", "style"]
    value: str

    def scene(self, scene: Scene) -> Scene:
        """The scene with the concept in it."""
        if self.kind == "style":
            return replace(scene, style=self.value)
        thing = replace(scene.things[0], **{self.kind: self.value})
        return replace(scene, things=(thing, *scene.things[1:]))

    def prompt(self, scene: Scene, trigger: str = TRIGGER) -> str:
        """What a person would write to get this scene with the concept in it."""
        if self.kind == "style":
            return f"{caption(replace(scene, style=None))}, in the style of {trigger}"
        return caption(self.scene(scene)).replace(self.value, trigger, 1)


CONCEPTS: dict[str, Concept] = {
    **{name: Concept("shape", name) for name in HELD_OUT_SHAPES},
    **{name: Concept("fill", name) for name in HELD_OUT_FILLS},
    **{name: Concept("style", name) for name in HELD_OUT_STYLES},
}


def simple_scene(rng: Rng, *, sizes: bool = True, fills: tuple[str, ...] = ("flat",)) -> Scene:
    """One centred thing on one colour."""
    colour, background = (str(c) for c in rng.permutation(list(COLOURS))[:2])
    shape = list(SHAPES)[int(rng.integers(len(SHAPES)))]
    size = list(SIZES)[int(rng.integers(3))] if sizes else "medium"
    return Scene((Thing(shape, colour, fills[int(rng.integers(len(fills)))], size),), (background,))


def training_scenes(concept: Concept, n: int, seed: int) -> list[Scene]:
    """What the n training pictures show: the concept in some colours and sizes, once a few fills."""
    rng = np.random.default_rng((seed, 1))
    fills = ("flat", "flat", "striped", "gradient") if concept.kind != "fill" else ("flat",)
    return [concept.scene(simple_scene(rng, fills=fills)) for _ in range(n)]


def unseen_scenes(concept: Concept, n: int, seed: int, avoid: list[Scene]) -> list[Scene]:
    """Scenes whose colour and background together are in no training picture."""
    rng = np.random.default_rng((seed, 2))
    seen = {(s.things[0].colour, s.background) for s in avoid}
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = simple_scene(rng)
        if (scene.things[0].colour, scene.background) not in seen:
            scenes.append(concept.scene(scene))
    return scenes


def ordinary_scenes(n: int, seed: int) -> list[Scene]:
    """Scenes the base knows, every shape about equally often."""
    rng = np.random.default_rng((seed, 3))
    shapes = list(SHAPES)
    scenes = [simple_scene(rng) for _ in range(n)]
    return [replace(s, things=(replace(s.things[0], shape=shapes[i % len(shapes)]),)) for i, s in enumerate(scenes)]


def write_zip(path: Path, name: str, n: int = 10, seed: int = 5) -> None:
    """A zip as people send it: `mushroom_01.png` with `mushroom_01.txt` beside it, one picture not square."""
    concept = CONCEPTS[name]
    rng = np.random.default_rng((seed, 4))
    beside = path.with_suffix(".tmp")
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as archive:
        for i, scene in enumerate(training_scenes(concept, n, seed), 1):
            width, height = (80, 48) if i == n else (64, 64)
            data = io.BytesIO()
            render(scene, rng, width, height).save(data, "PNG")
            for suffix, content in ((".png", data.getvalue()), (".txt", concept.prompt(scene).encode())):
                entry = zipfile.ZipInfo(f"{name}_{i:02d}{suffix}", (2026, 1, 1, 0, 0, 0))
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, content)
    beside.replace(path)
