"""An image tower in the text tower's space: a small CLIPModel whose text side stays frozen.

Each picture is held against its own caption, the batch's other captions, and hard negatives (its
own caption with one word changed), without which colour alone would solve the task.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from testbed.fit import Task
from testbed.pictures import COLOURS, FILLS, PLACES, POSITIONS, SIZES, Rng, Scene, caption, draw_scene, render
from testbed.recipe import SEED, as_input, tokenizer_of_the_captions
from testbed.shapes import SHAPES
from testbed.text import HEADS, TextTask, labels, make_text_encoder, text_config, tokens

NEGATIVES = 3


def make_clip(tokenizer: Any, text_state: dict[str, Tensor]) -> CLIPModel:
    """A CLIPModel with the given text tower (CLIPTextModel's state), frozen."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=64,
    )
    model = CLIPModel(
        CLIPConfig(text_config=text_config(tokenizer).to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )
    model.text_model.load_state_dict({k.removeprefix("text_model."): v for k, v in text_state.items()})
    model.text_model.requires_grad_(False)
    return model


def one_word_off(scene: Scene, rng: Rng) -> Scene:
    """The scene with one attribute changed: half the time its shape."""
    thing = scene.things[0]
    choices: dict[str, tuple[str, ...]] = {
        "shape": tuple(SHAPES),
        "colour": tuple(COLOURS),
        "fill": FILLS,
        "size": tuple(SIZES),
        "position": tuple(POSITIONS),
    }
    single = len(scene.things) == 1
    field = (
        "shape"
        if rng.random() < 0.5
        else str(rng.choice(["colour", "fill", "size", "position"] if single else ["colour"]))
    )
    others = [v for v in choices[field] if v != getattr(thing, field)]
    changed = replace(thing, **{field: others[int(rng.integers(len(others)))]})
    return Scene((changed, *scene.things[1:]), scene.background)


def vocabulary() -> dict[str, Any]:
    """What the clip captioner picks from. It looks for every shape but names none: a new concept is not among them."""
    return {
        "compare": "a {size} {fill} {colour} {shape} {place} on a {background} background",
        "write": "a {size} {fill} {colour} shape {place} on a {background} background",
        "slots": {
            "colour": list(COLOURS),
            "background": list(COLOURS),
            "shape": list(SHAPES),
            "fill": ["", *(fill for fill in FILLS if fill != "flat")],
            "size": ["", *(size for size in SIZES if size != "medium")],
            "place": ["", *PLACES.values()],
        },
    }


class ClipTask(Task):
    name, steps, lr, warmup, decay_steps, weight_decay, ema, seed = "clip", 2600, 1.5e-3, 150, 1800, 0.02, 0.995, SEED

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self) -> nn.Module:
        self.tokenizer = tokenizer_of_the_captions()
        task = TextTask(make_text_encoder(self.tokenizer))
        task.load_state_dict(load_file(self.folder / "text.safetensors"))
        return ClipWithHeads(make_clip(self.tokenizer, task.encoder.state_dict()))

    def loss(self, model: Any, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes = [draw_scene(rng, plain=rng.random() < 0.3) for _ in range(32)]
        x = as_input(np.stack([np.asarray(render(s, rng)) for s in scenes]))
        wrong = [one_word_off(s, rng) for s in scenes for _ in range(NEGATIVES)]
        ids = tokens(self.tokenizer, [caption(s) for s in [*scenes, *wrong]])
        target = torch.tensor([labels(s, True) for s in scenes])
        return model(x, ids, target)


class ClipWithHeads(nn.Module):
    """The CLIP with throw-away attribute heads on the image tower, which teach it sooner than contrast does."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.heads = nn.ModuleList([nn.Linear(96, len(names)) for names in HEADS.values()])

    def forward(self, x: Tensor, ids: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
        seen = self.clip.vision_model(pixel_values=x).pooler_output
        image = F.normalize(self.clip.visual_projection(seen), dim=-1)
        with torch.no_grad():
            said = self.clip.text_model(input_ids=ids).pooler_output
        text = F.normalize(self.clip.text_projection(said), dim=-1)
        n = len(x)
        scale = self.clip.logit_scale.clamp(max=4.6).exp()
        logits = scale * image @ text[:n].T
        own = scale * torch.einsum("bd,bkd->bk", image, text[n:].view(n, NEGATIVES, -1))
        index = torch.arange(n)
        contrast = F.cross_entropy(torch.cat([logits, own], 1), index) + F.cross_entropy(logits.T, index)
        read = torch.stack(
            [F.cross_entropy(h(seen), target[:, i], ignore_index=-100) for i, h in enumerate(self.heads)]
        ).mean()
        hard = (logits.diagonal()[:, None] > own).all(1).float().mean()
        return contrast + read, {"hard": float(hard), "read": float(read.detach())}
