"""Which strength to use, measured: how near samples at each strength come to the training pictures and their prompts.

Measured by the CLIP that comes with a base, which shares the base's text tower; most bases have none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainer import lean

log = logging.getLogger(__name__)

NEAR = 0.01  # of the sum of both cosines; what lies nearer together counts as equal
PICTURES = 64  # training pictures at most


@dataclass(frozen=True)
class Likeness:
    """Mean cosines of CLIP's features of the samples of one strength."""

    pictures: float  # to the mean feature of the training pictures
    prompts: float  # to the prompt that each was drawn from


@torch.no_grad()
def measure(
    folder: Path,
    samples: Mapping[float, Sequence[Path]],
    prompts: Sequence[str],
    pictures: Sequence[Path],
    tokenizer: Any,
) -> dict[float, Likeness]:
    """Strength -> likeness.

    Args:
        folder: a CLIPModel with preprocessor_config.json.
        samples: by strength, a picture for each of `prompts`.
        prompts: with the words of an ordinary prompt (a class word, not a trigger that CLIP never saw).
        pictures: what was trained on.
    """
    from transformers import CLIPModel  # only this needs it

    with lean.undrawn():
        clip: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    goal = F.normalize(_seen(clip, folder, pictures[:PICTURES]).mean(0, keepdim=True), dim=-1)
    words = _read(clip, tokenizer, prompts)
    found: dict[float, Likeness] = {}
    for strength, files in samples.items():
        features = _seen(clip, folder, files)
        found[strength] = Likeness(float((features @ goal.T).mean()), float((features * words).sum(-1).mean()))
    return found


def best(found: Mapping[float, Likeness]) -> float:
    """The strength with the largest sum; of those within NEAR of it the one that is nearest to 1."""
    sums = {strength: like.pictures + like.prompts for strength, like in found.items()}
    top = max(sums.values())
    return min(
        (s for s, value in sums.items() if value >= top - NEAR), key=lambda strength: (abs(strength - 1), strength)
    )


def _seen(clip: Any, folder: Path, files: Sequence[Path]) -> Tensor:
    """[N, P] unit features of pictures."""
    side: int = clip.config.vision_config.image_size
    settings: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = (torch.tensor(settings[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
    pixels = torch.stack([(_square(file, side) - mean) / std for file in files])
    return F.normalize(clip.visual_projection(clip.vision_model(pixel_values=pixels)[1]), dim=-1)


def _square(file: Path, side: int) -> Tensor:
    """[3, side, side] in 0..1: the shorter side resized, then cut at the centre, as CLIP does."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    scale = side / min(picture.size)
    picture = picture.resize(
        (max(side, round(picture.width * scale)), max(side, round(picture.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    cut = picture.crop((left, top, left + side, top + side))
    data = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8)
    return data.reshape(side, side, 3).permute(2, 0, 1).float() / 255


def _read(clip: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """[N, P] unit features of prompts, read at their end token."""
    rows: list[Tensor] = []
    for prompt in prompts:
        ids: list[int] = tokenizer(prompt).input_ids
        ids = [*ids[: tokenizer.model_max_length - 1], ids[-1]] if len(ids) > tokenizer.model_max_length else ids
        hidden = clip.text_model(torch.tensor([ids]))[0][:, len(ids) - 1]
        rows.append(F.normalize(clip.text_projection(hidden), dim=-1))
    return torch.cat(rows)
