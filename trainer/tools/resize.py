"""resize: a file's updates at a smaller rank, that of the nearest LoRA."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer import layouts
from trainer.models.skeleton import Skeleton
from trainer.progress import Progress
from trainer.tools import lowrank
from trainer.tools.files import ToolError, dtype_of, facts_of, kind, metadata_of, save
from trainer.tools.lowrank import Cut, Size
from trainer.updates import Difference, LoraTensors, Update, difference


def resize(
    given: Path, bones: Skeleton, out: Path, layout: str, size: Size, dtype: torch.dtype | None = None
) -> dict[str, tuple[int, int, float]]:
    """Writes the file at the ranks that `size` gives: of LoRAs, and of what else has matrices (LoHa, LoKr, full).

    Norms stay differences. A DoRA keeps its lengths: only its directions are cut.

    Returns:
        Layer -> rank before (0 where there was none), rank after, share of the energy that is left.

    Raises:
        LayoutError: the file is not understood.
        ToolError: a full difference has a bias beside its matrix, which a LoRA cannot say.
    """
    updates = layouts.read(given, bones)
    roots = {"denoiser": bones.denoiser, **bones.text_encoders}
    found: dict[tuple[str, str], Update] = {}
    rows: dict[str, tuple[int, int, float]] = {}
    with Progress("resizing", len(updates), "layer") as progress:
        for key, update in updates.items():
            shape = roots[key[0]].get_submodule(key[1]).get_parameter("weight").shape
            cut = _cut(key, update, shape, size)
            before = update.down.shape[0] if isinstance(update, LoraTensors) else 0
            if cut is None:
                found[key] = update
            else:
                lengths = update.magnitude if isinstance(update, LoraTensors) else None
                found[key] = LoraTensors(cut.lora.down, cut.lora.up, cut.lora.alpha, lengths)
                rows[" ".join(key)] = before, cut.lora.down.shape[0], cut.energy
            progress.advance()
    if not rows:
        raise ToolError(
            f"{given} has no matrices to resize: {', '.join(sorted({kind(up) for up in updates.values()}))}"
        )
    dropped = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args")
    metadata = {key: value for key, value in metadata_of(given).items() if key not in dropped}
    save(out, layout, found, bones, dtype or dtype_of(given), {**metadata, **facts_of(found, bones)})
    return rows


def _cut(key: tuple[str, str], update: Update, shape: torch.Size, size: Size) -> Cut | None:
    """None: there is no matrix."""
    if isinstance(update, LoraTensors):
        return lowrank.cut(LoraTensors(update.down, update.up, update.alpha), size)
    if len(shape) < 2:
        return None
    if isinstance(update, Difference) and update.bias is not None:
        raise ToolError(f"{' '.join(key)} has a difference of its bias, too, which a LoRA cannot say")
    return lowrank.nearest(difference(update, torch.zeros(shape)), size)
