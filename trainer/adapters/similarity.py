"""The similarity start: moves new token rows until their text feature is close to that of the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.types import BaseModelError

STEPS = 150
RATE = 0.05  # of the table's mean row std, a step
STD_WEIGHT = 0.1


def approach_pictures(
    folder: Path,
    rows: Tensor,
    ids: Tensor,
    pictures: Sequence[Tensor],
    *,
    end_id: int,
    wrap: Callable[[nn.Embedding, Tensor], nn.Module],
) -> Tensor:
    """Rows [n, D] after STEPS of Adam on 1 - cos(text feature, mean picture feature).

    Args:
        folder: a CLIPModel whose text tower is the base's, with preprocessor_config.json.
        rows: where they start, [n, D].
        ids: [1, L], a prompt that holds the new tokens and ends with `end_id`.
        pictures: [3, h, w] each, -1..1.
        wrap: builds the embedding that reads new ids from the rows, which it holds as `rows`.
    """
    from transformers import CLIPModel  # only this start needs it

    try:
        clip: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(f"text.init is similarity, but {str(folder)!r} holds no CLIPModel: {error}") from error
    table: nn.Embedding = clip.text_model.get_input_embeddings()
    if table.embedding_dim != rows.shape[1]:
        raise BaseModelError(
            f"the CLIP in {str(folder)!r} has tokens of width {table.embedding_dim}, the text encoder {rows.shape[1]}"
        )
    clip.requires_grad_(False)
    target = mean_picture_feature(clip, folder, pictures)
    embedding: Any = wrap(table, rows.clone())
    clip.text_model.set_input_embeddings(embedding)
    std = table.weight.std(dim=1).mean()
    end = int((ids[0, 1:] == end_id).nonzero()[0]) + 1
    optimizer = torch.optim.Adam([embedding.rows], lr=RATE * float(std))
    for _ in range(STEPS):
        hidden = clip.text_model(ids)[0][:, end]
        feature = clip.text_projection(hidden)
        drift = ((embedding.rows.std(dim=1) / std - 1) ** 2).mean()
        loss = 1 - F.cosine_similarity(feature, target).mean() + STD_WEIGHT * drift
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return embedding.rows.detach()


def mean_picture_feature(clip: Any, folder: Path, pictures: Sequence[Tensor]) -> Tensor:
    """[1, P]: the mean of the pictures' unit features."""
    return picture_features(clip, folder, pictures).mean(dim=0, keepdim=True)


@torch.no_grad()
def picture_features(clip: Any, folder: Path, pictures: Sequence[Tensor]) -> Tensor:
    """[n, P]: the pictures' unit features.

    Args:
        folder: what the CLIP was loaded from.
        pictures: [3, h, w] each, -1..1.
    """
    size: int = clip.config.vision_config.image_size
    mean, std = _normalisation(folder)
    features: list[Tensor] = []
    for picture in pictures:
        pixels = (_square(picture.float().cpu(), size) / 2 + 0.5 - mean) / std
        pooled = clip.vision_model(pixel_values=pixels.unsqueeze(0))[1]
        features.append(F.normalize(clip.visual_projection(pooled), dim=-1))
    return torch.cat(features)


def _square(picture: Tensor, size: int) -> Tensor:
    """[3, h, w] -> [3, size, size]: short side resized to `size`, then cut at the centre, as CLIP does."""
    _, h, w = picture.shape
    scale = size / min(h, w)
    shape = (max(size, round(h * scale)), max(size, round(w * scale)))
    resized = F.interpolate(picture.unsqueeze(0), shape, mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return resized[:, top : top + size, left : left + size].clamp(-1, 1)


def _normalisation(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and std [3, 1, 1] of the CLIP's own preprocessing; 0.5 and 0.5 where it states none."""
    path = folder / "preprocessor_config.json"
    stated: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    mean: list[float] = stated.get("image_mean", [0.5] * 3)
    std: list[float] = stated.get("image_std", [0.5] * 3)
    return torch.tensor(mean).reshape(3, 1, 1), torch.tensor(std).reshape(3, 1, 1)
