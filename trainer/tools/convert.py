"""convert: updates from any layout that is read to one that is written; embeddings to A1111's and ComfyUI's."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer import layouts
from trainer.layouts.container import Opened
from trainer.models import skeleton
from trainer.models.skeleton import Skeleton
from trainer.tools.files import (
    ToolError,
    dtype_of,
    facts_of,
    metadata_of,
    save,
    save_embedding,
    skeleton_for,
)

EMBEDDINGS = {("emb_params",): "sd15", ("clip_l", "clip_g"): "sdxl", ("text_encoders_0", "text_encoders_1"): "sdxl"}


def convert(
    given: Path,
    out: Path,
    layout: str,
    *,
    base: str | None = None,
    config: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the same updates in `layout`, in the file's own dtype unless another is asked for.

    Raises:
        LayoutError: something in the file is not understood, or the layout cannot say it.
        ToolError: the base cannot be told.
    """
    bones = skeleton_for(given, base, config)
    updates = layouts.read(given, bones)
    metadata = {**facts_of(updates, bones), **metadata_of(given)}
    save(out, layout, updates, bones, dtype or dtype_of(given), metadata)


def convert_embedding(given: Path, out: Path, *, base: str | None = None, config: str | None = None) -> None:
    """Writes the vectors of a file, or of a pickle, which is not run, as A1111 and ComfyUI read them."""
    bones = _bones(given, base, config)
    metadata = Opened(given).metadata if given.suffix.lower() == ".safetensors" else {}
    kept = {key: value for key, value in metadata.items() if key != "format"}
    save_embedding(out, layouts.read_embedding(given, bones), bones, kept)


def _bones(given: Path, base: str | None, config: str | None) -> Skeleton:
    if base is not None:
        return skeleton_for(given, base, config)
    if given.suffix.lower() != ".pt" and given.suffix.lower() != ".bin":
        held = set(Opened(given))
        for names, family in EMBEDDINGS.items():
            if held == set(names):
                return skeleton.published(family)
    raise ToolError(f"{given} does not tell what base it is for; say it with --base: sd15, sd2, sdxl or a path")
