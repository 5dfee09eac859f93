"""Small classifiers that read shape, colour, fill, size, position, background and style off a picture.

Two of them ship: `knows` has the held-out concepts among its classes, `blind` has never seen them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from testbed.fit import Task
from testbed.pictures import (
    COLOURS,
    FILLS,
    HELD_OUT_FILLS,
    HELD_OUT_STYLES,
    POSITIONS,
    SIZES,
    Rng,
    Scene,
    draw_scene,
    render,
)
from testbed.shapes import HELD_OUT_SHAPES, SHAPES

SIDE = 64


def classes(knows: bool) -> dict[str, tuple[str, ...]]:
    """Head -> class names, in the order of its logits."""
    return {
        "shape": (*SHAPES, *HELD_OUT_SHAPES) if knows else tuple(SHAPES),
        "colour": tuple(COLOURS),
        "fill": (*FILLS, *HELD_OUT_FILLS) if knows else FILLS,
        "size": tuple(SIZES),
        "position": tuple(POSITIONS),
        "background": tuple(COLOURS),
        "style": ("none", *HELD_OUT_STYLES) if knows else ("none",),
    }


class Judge(nn.Module):
    """[B, 3, 64, 64] in -1..1 -> logits by head; `features` [B, 96] is the layer under the heads."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.classes = classes(knows)
        layers: list[nn.Module] = []
        for inner, outer, stride in ((3, 24, 2), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 96, 2)):
            layers += [nn.Conv2d(inner, outer, 3, stride, 1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 96), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(names)) for name, names in self.classes.items()})

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        f = self.features(x)
        return {name: head(f) for name, head in self.heads.items()}

    @classmethod
    def load(cls, path: Path, knows: bool) -> Judge:
        judge = cls(knows)
        judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        return judge.eval().requires_grad_(False)

    @torch.inference_mode()
    def read(self, pictures: Sequence[Image.Image]) -> list[dict[str, str]]:
        """The most likely class of every head for each picture."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(tensor(pictures)).items()}
        return [{name: self.classes[name][best[name][i]] for name in best} for i in range(len(pictures))]


def tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures as [B, 3, 64, 64] in -1..1; other sizes are resized."""
    small = [
        p.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS) if p.size != (SIDE, SIDE) else p.convert("RGB")
        for p in pictures
    ]
    stacked = np.stack([np.asarray(p) for p in small])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def one_thing(rng: Rng, knows: bool) -> Scene:
    """A random scene with one thing; held-out shapes, fills and styles come in if the judge knows them."""
    kinds = classes(knows)
    while len((scene := draw_scene(rng, shapes=kinds["shape"], fills=kinds["fill"])).things) != 1:
        pass
    if knows and rng.random() < 0.3:
        return Scene(scene.things, scene.background, HELD_OUT_STYLES[int(rng.integers(len(HELD_OUT_STYLES)))])
    return scene


def truth(scene: Scene, knows: bool) -> list[int]:
    thing = scene.things[0]
    said = [
        thing.shape,
        thing.colour,
        thing.fill,
        thing.size,
        thing.position,
        scene.background[0],
        scene.style or "none",
    ]
    return [names.index(word) for names, word in zip(classes(knows).values(), said, strict=True)]


def worn(picture: Image.Image, rng: Rng) -> NDArray[Any]:
    """The picture as a generator might give it: a little blurred and noisy."""
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 1.0))))
    pixels = np.asarray(picture, np.float32) / 127.5 - 1
    if rng.random() < 0.6:
        coarse = rng.normal(0, rng.uniform(0.02, 0.12), (16, 16, 3)).repeat(4, 0).repeat(4, 1)
        pixels = pixels + coarse + rng.normal(0, rng.uniform(0.0, 0.06), pixels.shape)
    return pixels.astype(np.float32)


class JudgeTask(Task):
    steps, lr, decay_steps, weight_decay, ema = 1500, 2e-3, 1000, 0.01, 0.99

    def __init__(self, knows: bool) -> None:
        self.knows = knows
        self.name = "judge_knows" if knows else "judge_blind"
        self.seed = 11 + knows

    def model(self) -> nn.Module:
        return Judge(self.knows)

    def loss(self, model: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes = [one_thing(rng, self.knows) for _ in range(32)]
        x = torch.from_numpy(np.stack([worn(render(s, rng), rng) for s in scenes])).permute(0, 3, 1, 2)
        target = torch.tensor([truth(s, self.knows) for s in scenes])
        logits = model(x.contiguous())
        losses = [F.cross_entropy(v, target[:, i], label_smoothing=0.02) for i, v in enumerate(logits.values())]
        right = (logits["shape"].argmax(1) == target[:, 0]).float().mean()
        return torch.stack(losses).mean(), {"shape": float(right)}


def accuracy(judge: Judge, knows: bool, n: int = 1000, seed: int = 99) -> dict[str, float]:
    """Share right by head on renderings from a seed that training never used."""
    rng = np.random.default_rng(seed)
    scenes = [one_thing(rng, knows) for _ in range(n)]
    read = judge.read([render(s, rng) for s in scenes])
    kinds = classes(knows)
    hits = dict.fromkeys(kinds, 0)
    for scene, seen in zip(scenes, read, strict=True):
        for (name, names), index in zip(kinds.items(), truth(scene, knows), strict=True):
            hits[name] += seen[name] == names[index]
    return {name: hit / n for name, hit in hits.items() if len(kinds[name]) > 1}
