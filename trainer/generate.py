"""Finished weights on a base: a run directory, a kohya or a diffusers LoRA file, an embedding -> pictures.

The LoRA goes through diffusers' own loader, so what is drawn here is what a client of the file draws.
Pickles are refused: reading one runs the code in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from trainer import environment, registry, sampler
from trainer.adapters.textual_inversion import TextualInversion
from trainer.args import ModelArgs, TextArgs, TrainArgs
from trainer.export import embedding_name
from trainer.models import FAMILIES
from trainer.rundir import RunDir
from trainer.types import ModelFamily

LORA = "learned"  # the name of the LoRA inside the pipeline
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


class GenerateError(ValueError):
    """Weights that cannot be used, or that do not fit the base. One sentence."""


@dataclass(frozen=True)
class Weights:
    """What to put on a base."""

    lora: Path | None
    embedding: Path | None
    trigger: str
    model: ModelArgs  # the base that it was trained on, where that is known


def find(path: Path, base: str | None = None, trigger: str | None = None) -> Weights:
    """The weights at `path`: a run directory or a .safetensors file, with `<name>_embedding.safetensors` beside it.

    Args:
        base: overrides the base that the run was trained on; needed for a file unless the default base fits.
        trigger: overrides the trigger that the files name.
    """
    if path.is_dir():
        return _of_run(RunDir.open(path), base, trigger)
    if path.suffix.lower() in PICKLES:
        raise GenerateError(f"{path} is a pickle, which could run code when it is read; convert it to .safetensors")
    if not path.is_file():
        raise GenerateError(f"{path} does not exist; give a run directory or a .safetensors file")
    keys, facts = _header(path)
    if _is_embedding(keys):
        lora, embedding = None, path
    else:
        lora, embedding = path, _beside(path)
    if embedding is not None:
        facts = {**_header(embedding)[1], **facts}
    model = ModelArgs.model_validate({"base": base} if base else {})
    return Weights(lora, embedding, trigger or facts.get("modelspec.trigger_phrase", "TOK"), model)


def _of_run(run: RunDir, base: str | None, trigger: str | None) -> Weights:
    args = TrainArgs.model_validate_json(run.args.read_text(encoding="utf-8"))
    name = args.runtime.name
    lora, embedding = run.export / f"{name}.safetensors", run.export / f"{embedding_name(name)}.safetensors"
    if not lora.is_file() and not embedding.is_file():
        raise GenerateError(f"{run.root} has exported nothing yet; finish it with: python train.py --resume {run.root}")
    return Weights(
        lora=lora if lora.is_file() else None,
        embedding=embedding if embedding.is_file() else None,
        trigger=trigger or args.data.trigger,
        model=args.model.model_copy(update={"base": base} if base else {}),
    )


class Painter:
    """A base with weights on it."""

    def __init__(self, weights: Weights, device: torch.device, *, code: bool = True) -> None:
        """Loads the base and puts the weights on it.

        Raises:
            BaseModelError: the base cannot be used.
            GenerateError: the weights are damaged or do not fit it.
        """
        kind: Any = registry.load(FAMILIES, weights.model.family, "model.family", code=code)
        self.family: ModelFamily = kind.load(weights.model, device)
        self._lora = weights.lora is not None
        try:
            if weights.lora is not None:
                _put_lora(self.family, weights.lora)
            if weights.embedding is not None:
                _put_rows(self.family, weights.embedding, weights.trigger)
        except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
            if isinstance(error, GenerateError):
                raise
            first = str(error).strip().splitlines()[0]
            raise GenerateError(f"the weights do not fit the base {weights.model.base!r}: {first}") from error

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        steps: int = 25,
        guidance: float = 3.0,
        strength: float = 1.0,
        negative: str = "",
        width: int | None = None,
        height: int | None = None,
    ) -> list[Image.Image]:
        """One picture for each prompt; the first has `seed`, the next the next."""
        if self._lora:
            self.family.pipeline().set_adapters(LORA, strength)
        return sampler.generate(
            self.family,
            prompts,
            seeds=[seed + index for index in range(len(prompts))],
            steps=steps,
            guidance=guidance,
            negative=negative,
            width=width,
            height=height,
        )


def _put_lora(family: ModelFamily, path: Path) -> None:
    keys, _ = _header(path)
    pipe = family.pipeline()
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=LORA, local_files_only=True)
    wanted = sum(key.endswith((".lora_down.weight", ".lora_A.weight")) for key in keys)
    modules = (module for root in (family.denoiser, *family.text_encoders.values()) for module in root.modules())
    taken = sum(LORA in getattr(module, "lora_A", {}) for module in modules)
    if taken != wanted or not wanted:
        raise GenerateError(f"{path} holds updates of {wanted} layers, and the base took {taken}; is it another base?")


def _put_rows(family: ModelFamily, path: Path, trigger: str) -> None:
    tensors = load_file(path)
    names = {family.clients.embeddings[encoder]: encoder for encoder in family.text_encoders}
    if tensors.keys() != names.keys():
        raise GenerateError(f"{path} holds {', '.join(sorted(tensors))}; this base takes {', '.join(sorted(names))}")
    rows = TextualInversion(TextArgs.model_validate({"tokens": len(next(iter(tensors.values())))}), trigger, seed=0)
    rows.attach(family)
    rows.load_state_dict({f"{names[key]}.rows": tensor.float() for key, tensor in tensors.items()})


def _header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors, and the metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise GenerateError(f"{path} is damaged or no .safetensors file: {error}") from error


def _is_embedding(keys: Sequence[str]) -> bool:
    return len(keys) <= 3 and all("." not in key for key in keys)


def _beside(lora: Path) -> Path | None:
    """The embedding that belongs to a LoRA file: of its own name, or the only one of its folder."""
    own = lora.with_name(f"{embedding_name(lora.stem)}.safetensors")
    if own.is_file():
        return own
    every = sorted(lora.parent.glob("*_embedding.safetensors"))
    return every[0] if lora.name == "pytorch_lora_weights.safetensors" and len(every) == 1 else None


def free_names(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """A new file for each picture; pictures from before are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name[:4]) for path in folder.glob("[0-9][0-9][0-9][0-9]_seed*.png")]
    first = max(taken, default=-1) + 1
    return [folder / f"{first + index:04d}_seed{seed}.png" for index, seed in enumerate(seeds)]


def save(pictures: Sequence[Image.Image], files: Sequence[Path], facts: Sequence[Mapping[str, Any]]) -> None:
    """Writes the PNGs, each with what it was made from in its text chunk `tempera`."""
    for picture, file, made_from in zip(pictures, files, facts, strict=True):
        info = PngInfo()
        info.add_text("tempera", json.dumps(made_from))
        picture.save(file, "PNG", pnginfo=info)


def located(weights: Weights) -> Weights:
    """The same with a local base found from here or beside the project."""
    return replace(weights, model=weights.model.model_copy(update={"base": environment.located(weights.model.base)}))


def device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in have.items() if there))
    if not have[name]:
        raise GenerateError(f"the device {name} is not on this machine; use auto or cpu")
    return torch.device(name)
