"""Finished weights on a base: a run directory, a kohya or a diffusers LoRA file, an embedding -> pictures.

A LoRA goes through diffusers' own loader, so what is drawn here is what a client of the file draws; updates that
diffusers does not read are added to the base's weights.
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

from trainer import environment, layouts, registry, sampler
from trainer.adapters.textual_inversion import Concept, TextualInversion
from trainer.args import ModelArgs, TextArgs, TrainArgs
from trainer.export import embedding_name
from trainer.models import FAMILIES, sniff
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
    embeddings: Mapping[str, Path]  # by the trigger that each stands for
    model: ModelArgs  # the base that it was trained on, where that is known


def find(path: Path, base: str | None = None, trigger: str | None = None) -> Weights:
    """The weights at `path`: a run directory or a .safetensors file, with the embeddings of its name beside it.

    Args:
        base: overrides the base that the run was trained on; needed for a file unless the default base fits.
        trigger: overrides the trigger that the file names; of several embeddings each keeps its own.
    """
    if path.is_dir():
        return _of_run(RunDir.open(path), base, trigger)
    if path.suffix.lower() in PICKLES:
        raise GenerateError(f"{path} is a pickle, which could run code when it is read; convert it to .safetensors")
    if not path.is_file():
        raise GenerateError(f"{path} does not exist; give a run directory or a .safetensors file")
    alone = _is_embedding(_header(path)[0])
    embeddings = [path] if alone else _beside(path)
    model = ModelArgs.model_validate({"base": base} if base else {})
    return Weights(None if alone else path, _by_trigger(embeddings, trigger), model)


def _of_run(run: RunDir, base: str | None, trigger: str | None) -> Weights:
    args = TrainArgs.model_validate_json(run.args.read_text(encoding="utf-8"))
    name = args.runtime.name
    lora = run.export / f"{name}.safetensors"
    embeddings = _of_name(run.export, name)
    if not lora.is_file() and not embeddings:
        raise GenerateError(f"{run.root} has exported nothing yet; finish it with: python train.py --resume {run.root}")
    return Weights(
        lora=lora if lora.is_file() else None,
        embeddings=_by_trigger(embeddings, trigger),
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
        kind: Any = registry.load(FAMILIES, sniff.named(weights.model).family, "model.family", code=code)
        self.family: ModelFamily = kind.load(weights.model, device)
        self._lora = weights.lora is not None and layouts.is_plain_lora(_header(weights.lora)[0])
        self._merged: layouts.Merged | None = None
        try:
            layouts.merge(self.family, weights.model.merge)
            if weights.lora is not None and self._lora:
                _put_lora(self.family, weights.lora)
            elif weights.lora is not None:
                self._merged = layouts.Merged(self.family, layouts.read(weights.lora, self.family))
                self._merged.set(1.0)  # who draws with the family itself has the weights on it, as with a LoRA
            if weights.embeddings:
                _put_rows(self.family, weights.embeddings)
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
        if self._merged is not None:
            self._merged.set(strength)
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


def _put_rows(family: ModelFamily, paths: Mapping[str, Path]) -> None:
    names = {family.clients.embeddings[encoder]: encoder for encoder in family.text_encoders}
    loaded = {trigger: load_file(path) for trigger, path in paths.items()}
    for trigger, tensors in loaded.items():
        if tensors.keys() != names.keys():
            held, taken = ", ".join(sorted(tensors)), ", ".join(sorted(names))
            raise GenerateError(f"{paths[trigger]} holds {held}; this base takes {taken}")
    counts = {len(tensor) for tensors in loaded.values() for tensor in tensors.values()}
    if len(counts) > 1:
        raise GenerateError(
            f"{', '.join(str(path) for path in paths.values())} hold different numbers of vectors, so they are not of "
            "one run; give one of them alone"
        )
    options = TextArgs.model_validate({"tokens": counts.pop()})
    rows = TextualInversion(options, [Concept(trigger) for trigger in loaded], seed=0)
    rows.attach(family)
    rows.load_state_dict(
        {
            f"{encoder}.rows": torch.cat([loaded[trigger][key].float() for trigger in rows.triggers])
            for key, encoder in names.items()
        }
    )


def _header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors, and the metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise GenerateError(f"{path} is damaged or no .safetensors file: {error}") from error


def _is_embedding(keys: Sequence[str]) -> bool:
    return len(keys) <= 3 and all("." not in key for key in keys)


def _beside(lora: Path) -> list[Path]:
    """The embeddings that belong to a LoRA file: of its own name, or of the one run whose files its folder holds."""
    if lora.name != "pytorch_lora_weights.safetensors":
        return _of_name(lora.parent, lora.stem)
    every = sorted(lora.parent.glob("*_embedding.safetensors"))
    if len(every) == 1:
        return every
    of_runs = [_of_name(lora.parent, other.stem) for other in lora.parent.glob("*.safetensors") if other not in every]
    return next((found for found in of_runs if found == every), [])


def _of_name(folder: Path, name: str) -> list[Path]:
    """The embeddings that a run of this name exported."""
    one = folder / f"{embedding_name(name)}.safetensors"
    own = one.name.removesuffix("_embedding.safetensors")
    several = sorted(folder.glob(f"{own}_*_embedding.safetensors"))  # also of runs whose names begin like this one's
    return [one] if one.is_file() else [path for path in several if _header(path)[1].get("modelspec.title") == name]


def _by_trigger(paths: Sequence[Path], trigger: str | None) -> dict[str, Path]:
    """The embeddings by the trigger that each file names, or that was chosen for the only one."""
    if trigger is not None and len(paths) > 1:
        raise GenerateError(
            f"a trigger was chosen ({trigger!r}), and there are {len(paths)} embeddings "
            f"({', '.join(path.name for path in paths)}); give one of the files alone, or no trigger"
        )
    found = {trigger or _header(path)[1].get("modelspec.trigger_phrase", "TOK"): path for path in paths}
    if len(found) < len(paths):
        raise GenerateError(f"two of {', '.join(path.name for path in paths)} stand for one trigger; give one of them")
    return found


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
