"""inspect: what a file is, for which base, its ranks, alphas and sizes by layer, who can read it, what it says."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import layouts
from trainer.layouts import keys
from trainer.layouts.container import NAMES, Entry, LayoutError, Opened
from trainer.layouts.forms import update_of
from trainer.layouts.kinds import kind_of
from trainer.layouts.read import Said
from trainer.progress import Progress
from trainer.tools import lowrank
from trainer.tools.files import kind
from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, Update, difference

# How a layer's name begins -> what programs call files of such names. The first that fits.
SPELLINGS = {
    "kohya, names of the original code": r"lora_unet_((in|out)put_blocks|middle_block|time_embed_|label_emb|out_)",
    "kohya": r"lora_(unet|te\d?)_",
    "LyCORIS": r"lycoris_",
    "ComfyUI": r"diffusion_model\.",
    "diffusers": r"(unet|transformer|text_encoder(_2)?)\.",
    "OneTrainer": r"clip_[lg]\.",
}
READS = ("ComfyUI", "AUTOMATIC1111", "Forge", "diffusers")
YES = "yes"


@dataclass(frozen=True)
class Layer:
    """One layer's update."""

    name: str  # as the file spells it
    kind: str
    rank: int | None
    alpha: float | None
    shape: tuple[int, ...]  # of the weight
    norm: float  # Frobenius norm of what is added to the weight; of a DoRA, before its lengths


def inspect(path: Path) -> dict[str, Any]:
    """Facts of a file or folder, fit for JSON: always `file`, `what`, `tensors`, `bytes`, `metadata`.

    Raises:
        LayoutError: it is damaged, or nothing that is read.
    """
    if path.is_file() and layouts.is_embedding(path):
        return _embedding(path)
    files = [file for file, _ in layouts.files_of(path)]
    opened = [Opened(file) for file in files]
    facts: dict[str, Any] = {
        "file": str(path),
        "what": "nothing that is known here",
        "tensors": sum(len(file) for file in opened),
        "bytes": sum(entry.size for file in opened for entry in file.entries.values()),
        "dtypes": dict(Counter(NAMES[e.dtype] for file in opened for e in file.entries.values() if e.shape)),
        "metadata": {key: value for file in opened for key, value in file.metadata.items()},
    }
    if any(keys.split(key) for file in opened for key in file):
        return facts | _updates(path, opened)
    names = {key for file in opened for key in file}
    if any(name.startswith("model.diffusion_model.") for name in names):
        facts |= {"what": "checkpoint", "base": _family_of_checkpoint(path)}
    elif any(name.startswith(("down_blocks.", "encoder.layers.", "text_model.")) for name in names):
        facts |= {"what": "a part of a diffusers folder"}
    return facts


def _family_of_checkpoint(path: Path) -> str:
    from trainer.args import ModelArgs
    from trainer.models import sniff
    from trainer.types import BaseModelError

    try:
        return sniff.TITLES[sniff.named(ModelArgs.model_validate({"base": str(path)})).family]
    except BaseModelError as error:
        return str(error)


def _embedding(path: Path) -> dict[str, Any]:
    tensors = layouts.embeddings.vectors(path)
    metadata = Opened(path).metadata if path.suffix.lower() not in layouts.embeddings.PICKLES else {}
    return {
        "file": str(path),
        "what": "embedding",
        "tensors": len(tensors),
        "bytes": sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()),
        "vectors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "norms": {name: float(tensor.float().norm(dim=-1).mean()) for name, tensor in tensors.items()},
        "metadata": metadata,
    }


def _updates(path: Path, files: list[Opened]) -> dict[str, Any]:
    strange = [key for file in files for key in file if keys.split(key) is None]
    every = [layer for file in files for layer in _layers(file)]
    entries = {key: entry for file in files for key, entry in file.entries.items()}
    found = Counter((layer.kind, layer.rank, layer.alpha) for layer in every)
    return {
        "what": "updates of layers",
        "base": kind_of(entries) or "not told by its names and shapes",
        "spelled": _spelled(entries),
        "not understood": strange,
        "kinds": [
            {"kind": kind, "rank": rank, "alpha": alpha, "layers": count}
            for (kind, rank, alpha), count in sorted(found.items(), key=lambda item: -item[1])
        ],
        "norm": math.sqrt(sum(layer.norm**2 for layer in every)),
        "alpha tensors": sum(key.endswith(".alpha") for key in entries),
        "programs": programs(entries, {layer.kind for layer in every}),
        "layers": [vars(layer) for layer in every],
    }


def _spelled(entries: Mapping[str, Entry]) -> dict[str, int]:
    """Spelling -> how many tensors have it."""
    counts: Counter[str] = Counter()
    for key in entries:
        counts[_spelling(key)] += 1
    return dict(counts)


def _spelling(key: str) -> str:
    if ".processor." in key or re.search(r"\.(lora|lora_linear_layer)\.(up|down)\.", key):
        return "diffusers before PEFT"
    if key.startswith(keys.WRAPPERS):
        return "PEFT"
    return next((name for name, start in SPELLINGS.items() if re.match(start, key)), "bare paths")


def _layers(file: Opened) -> list[Layer]:
    groups: dict[str, dict[str, str]] = {}
    for key in file:
        if found := keys.split(key):
            groups.setdefault(found[0], {})[found[1]] = key
    said = Said.beside(file)
    layers: list[Layer] = []
    with Progress("measuring", len(groups), "layer") as progress:
        for name, ends in groups.items():
            tensors = {end: file.finite(key).float() for end, key in ends.items()}
            try:
                shape = _shape(tensors)
                update = update_of(tensors, said.of(name, tensors), shape)
            except (ValueError, IndexError, RuntimeError) as error:
                raise LayoutError(f"{file.path} at {name}: {error}") from error
            rank, alpha = _rank(update)
            layers.append(Layer(name, kind(update), rank, alpha, shape, _norm(update, shape)))
            progress.advance()
    return layers


def _shape(ends: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Of the weight, as far as an update tells it."""
    if "diff" in ends:
        return tuple(ends["diff"].shape)
    if "lora_up.weight" in ends and "lora_down.weight" in ends:
        inner = ends["lora_mid.weight"].shape[2:] if "lora_mid.weight" in ends else ends["lora_down.weight"].shape[2:]
        return (ends["lora_up.weight"].shape[0], ends["lora_down.weight"].shape[1], *inner)
    if "hada_w1_a" in ends and "hada_w1_b" in ends:
        if "hada_t1" in ends:
            return (ends["hada_w1_a"].shape[1], ends["hada_w1_b"].shape[1], *ends["hada_t1"].shape[2:])
        return (ends["hada_w1_a"].shape[0], ends["hada_w1_b"].shape[1])
    sides = [_matrix(ends, "lokr_w1"), _matrix(ends, "lokr_w2")]
    if all(sides):
        kernel = ends["lokr_w2"].shape[2:] if "lokr_w2" in ends else ends.get("lokr_t2", torch.empty(0, 0)).shape[2:]
        return (sides[0][0] * sides[1][0], sides[0][1] * sides[1][1], *kernel)
    raise ValueError(f"{', '.join(sorted(ends))} are no update that is understood")


def _matrix(ends: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name in ends:
        return tuple(ends[name].shape[:2])
    if f"{name}_a" in ends and f"{name}_b" in ends:
        rows = ends[f"{name}_a"].shape[1 if name == "lokr_w2" and "lokr_t2" in ends else 0]
        return (rows, ends[f"{name}_b"].shape[1])
    return ()


def _rank(update: Update) -> tuple[int | None, float | None]:
    if isinstance(update, LoraTensors):
        return update.down.shape[0], update.alpha
    if isinstance(update, LohaTensors):
        return update.w1_b.shape[0], update.alpha
    if isinstance(update, LokrTensors):
        ranks = [pair[1].shape[0] for pair in (update.w2, update.w1) if len(pair) == 2]
        return (ranks[0], update.scale * ranks[0]) if ranks else (None, None)
    return None, None


def _norm(update: Update, shape: tuple[int, ...]) -> float:
    """Of what is added, without multiplying a LoRA out: |B A|^2 = sum of (B' B) * (A A')."""
    if isinstance(update, LoraTensors):
        up, down = lowrank.factors(LoraTensors(update.down, update.up, update.alpha))
        up, down = up.double(), down.double()
        return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))
    if isinstance(update, Difference):
        return float(update.weight.norm())
    return float(difference(update, torch.zeros(shape)).norm())


def programs(entries: Mapping[str, Entry], kinds: set[str]) -> dict[str, str]:
    """Program -> `yes`, or what it does with such a file instead: the rules measured in docs/formats.md."""
    spelled = set(_spelled(entries))
    kohya = spelled <= {"kohya", "kohya, names of the original code"}
    rows = any(key.endswith("dora_scale") and entry.shape[:1] != (1,) for key, entry in entries.items())
    found: dict[str, str] = dict.fromkeys(READS, YES)
    if not kohya:
        found["AUTOMATIC1111"] = "no: it knows kohya's names only"
        if spelled & {"diffusers", "PEFT", "bare paths"}:
            found["ComfyUI"] = "in part or not at all: it does not know PEFT's names of a UNet"
            found["Forge"] = "no: it refuses files with names that it does not know"
        if spelled != {"diffusers"} and not spelled <= {"diffusers before PEFT"}:
            found["diffusers"] = "no: it does not know these names"
    elif kinds & {"loha", "lokr", "full"}:
        found["diffusers"] = f"no: it reads no {', '.join(sorted(kinds & {'loha', 'lokr', 'full'}))}"
    elif "dora" in kinds:
        found["diffusers"] = "as a plain LoRA: it drops dora_scale"
    elif (
        kind_of(entries) in ("Stable Diffusion 1.5", "Stable Diffusion 2")
        and len(spelled) == 1
        and "kohya" not in spelled
    ):
        found["diffusers"] = "no: of this family it knows the names of diffusers only"
    if rows and kohya:
        found["ComfyUI"] = found["Forge"] = "otherwise than trained: it divides by other lengths"
        found["AUTOMATIC1111"] = "wrongly: it takes lengths of rows for those of columns"
    if not any(key.endswith(".alpha") for key in entries) and "diffusers" not in spelled and found["ComfyUI"] == YES:
        found = {name: said if said != YES else "yes, at scale 1: there is no alpha" for name, said in found.items()}
    return found
