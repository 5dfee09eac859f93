"""extract: what was trained between two checkpoints, as the LoRA that is nearest to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer.models.skeleton import Skeleton
from trainer.progress import Progress
from trainer.tools import lowrank
from trainer.tools.bases import Base
from trainer.tools.files import ToolError, facts_of, save
from trainer.tools.lowrank import Size
from trainer.updates import Update


@dataclass
class Extracted:
    """What became of the layers that differ."""

    kept: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])  # layer: rank, energy
    left: list[str] = field(default_factory=list[str])  # norms and biases that differ, which a LoRA cannot say
    error: float = 0.0  # |what the LoRA adds - what was trained| / |what was trained|, over all matrices


def extract(
    base: Base,
    tuned: Base,
    bones: Skeleton,
    out: Path,
    layout: str,
    size: Size,
    *,
    conv: Size | None = None,
    dtype: torch.dtype | None = None,
) -> Extracted:
    """Writes the nearest LoRA of each matrix's difference; convolutions with kernels have `conv` [default: size].

    Raises:
        ToolError: nothing differs, or the two are not of one architecture.
    """
    found = Extracted()
    updates: dict[tuple[str, str], Update] = {}
    total, missed = 0.0, 0.0
    keys = list(base)
    with Progress("extracting", len(keys), "tensor") as progress:
        for key in keys:
            progress.advance()
            if key not in tuned or tuned.entry(key).shape != base.entry(key).shape:
                raise ToolError(
                    f"{tuned.path} has no {' '.join(key)} of {list(base.entry(key).shape)}, as the base has"
                )
            change = tuned.tensor(key).float() - base.tensor(key).float()
            if not bool(change.any()):
                continue
            name = " ".join(key[:2])
            embedding = key[1].endswith("embedding") and key[0] != "denoiser"  # a table, which no LoRA file changes
            if key[2] != "weight" or change.ndim < 2 or embedding:
                found.left.append(" ".join(key))
                continue
            kernel = change.ndim == 4 and change.shape[2:] != (1, 1)
            cut = lowrank.nearest(change, conv if kernel and conv else size)
            found.kept[name] = cut.lora.down.shape[0], cut.energy
            energy = float(change.double().square().sum())
            total, missed = total + energy, missed + energy * (1 - cut.energy)
            updates[key[0], key[1]] = cut.lora
    if not updates:
        raise ToolError(f"{tuned.path} has the same matrices as {base.path}; there is nothing to extract")
    found.error = (missed / total) ** 0.5 if total else 0.0
    first = next(iter(updates))
    save(out, layout, updates, bones, dtype or tuned.entry((*first, "weight")).dtype, facts_of(updates, bones))
    return found


def ranks(updates: Extracted) -> str:
    """`4 to 32`."""
    found = sorted(rank for rank, _ in updates.kept.values())
    return f"{found[0]}" if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
