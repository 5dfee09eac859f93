"""Files of updates for the tools: what they are of, read with names alone, written in a layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer import layouts
from trainer.layouts.container import Entry, Opened, write_all
from trainer.layouts.kinds import TITLES, family_of
from trainer.models import skeleton
from trainer.models.skeleton import Skeleton
from trainer.rundir import atomic_folder, atomic_write
from trainer.updates import Difference, LoraTensors, Update

Updates = Mapping[tuple[str, str], Update]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = ("kohya", "diffusers", "comfy", "peft")
ALPHAS = "lora_adapter_metadata"  # the metadata that carries alpha in the diffusers layout


class ToolError(ValueError):
    """What a tool was asked for and cannot do. One sentence."""


def skeleton_for(given: Path, base: str | None, config: str | None = None) -> Skeleton:
    """Names and shapes of the layers that a file's updates are of.

    Args:
        base: a family's name or a base's path [default: what the file's names and shapes tell].
        config: the diffusers folder whose configs a single file has.
    """
    if config is not None and (base is None or not Path(base).is_file()):
        raise ToolError("--config gives the configs of a base that is one file, and no such base was given")
    if base is not None:
        return skeleton.published(base) if skeleton.is_family(base) else skeleton.of_base(base, config)
    name = family_of(entries_of(given))
    if name is None:
        raise ToolError(f"{given} does not tell what base it is for; say it with --base: sd15, sd2, sdxl or a path")
    if name not in skeleton.PUBLISHED:
        raise ToolError(f"{given} is for {TITLES[name]}, whose layers are not known here")
    return skeleton.published(name)


def entries_of(given: Path) -> dict[str, Entry]:
    """What the headers of all its files say."""
    return {key: entry for path, _ in layouts.files_of(given) for key, entry in Opened(path).entries.items()}


def dtype_of(given: Path) -> torch.dtype:
    """The one of its matrices; where they differ, float32."""
    found = {entry.dtype for entry in entries_of(given).values() if entry.shape and entry.dtype.is_floating_point}
    return found.pop() if len(found) == 1 else torch.float32


def metadata_of(given: Path) -> dict[str, str]:
    """Of its only file, without what belongs to a layout."""
    files = layouts.files_of(given)
    found = Opened(files[0][0]).metadata if len(files) == 1 else {}
    return {key: value for key, value in found.items() if key not in (ALPHAS, "format")}


def facts_of(updates: Updates, bones: Skeleton) -> dict[str, str]:
    """What file managers show of updates, and without which A1111 takes a file for one of Stable Diffusion 1."""
    ranks = {str(up.down.shape[0]) for up in updates.values() if isinstance(up, LoraTensors)}
    alphas = {f"{up.alpha:g}" for up in updates.values() if isinstance(up, LoraTensors)}
    plain = all(isinstance(update, LoraTensors) for update in updates.values())
    facts = {
        "ss_base_model_version": bones.clients.base_version,
        **bones.clients.facts,
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{bones.clients.architecture}/lora",
    }
    if not ranks:
        return facts
    rank, alpha = ranks.pop() if len(ranks) == 1 else "Dynamic", alphas.pop() if len(alphas) == 1 else "Dynamic"
    return {**facts, "ss_network_dim": rank, "ss_network_alpha": alpha}


def save(
    out: Path, layout: str, updates: Updates, bones: Skeleton, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Writes updates in a layout of LAYOUTS: a file, or for peft a folder.

    Raises:
        LayoutError: the layout cannot say them. Nothing is written then.
        ToolError: the name does not fit the layout, or a number became infinite in `dtype`.
    """
    if layout == "peft":
        parts = layouts.peft_folders(updates, bones.clients)
        with atomic_folder(out) as folder:
            for part, (state, config) in parts.items():
                write_all(folder / part / "adapter_model.safetensors", _cast(out, state, dtype), {"format": "pt"})
                atomic_write(folder / part / "adapter_config.json", config)
        return
    if out.suffix != ".safetensors":
        raise ToolError(f"--out is {out}, and a file of this layout ends in .safetensors")
    if layout == "diffusers":
        state = layouts.diffusers_state(updates, bones.clients)
        metadata = {**metadata, "format": "pt", ALPHAS: layouts.diffusers_metadata(updates, bones.clients)}
    else:
        spelled = {"kohya": layouts.kohya_state, "comfy": layouts.comfy_state}[layout]
        state = spelled(updates, bones.clients)
    write_all(out, _cast(out, state, dtype), metadata)


def save_embedding(out: Path, rows: Mapping[str, Tensor], bones: Skeleton, metadata: Mapping[str, str]) -> None:
    """Vectors by text encoder, as A1111 and ComfyUI read them."""
    if out.suffix != ".safetensors":
        raise ToolError(f"--out is {out}, and an embedding is written as .safetensors")
    write_all(out, {bones.clients.embeddings[encoder]: vectors for encoder, vectors in rows.items()}, metadata)


def _cast(out: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """In the file's dtype; alphas (0-d) stay float32."""
    tensors = {key: (t.float() if t.ndim == 0 else t.to(dtype)).contiguous() for key, t in state.items()}
    for key, tensor in tensors.items():
        if not bool(tensor.float().isfinite().all()):
            raise ToolError(f"{key} has numbers that {out} cannot hold as {dtype}; take --dtype fp32 or bf16")
    return tensors


def kind(update: Update) -> str:
    """As people call it."""
    if isinstance(update, LoraTensors):
        return "lora" if update.magnitude is None else "dora"
    return "full" if isinstance(update, Difference) else type(update).__name__.removesuffix("Tensors").lower()
