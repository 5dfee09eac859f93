"""Finished weights on a base: a run directory, files of other programs (docs/imports.md), an embedding -> pictures.

A LoRA named as our own goes through diffusers' loader, so what is drawn here is what a client of the file draws; all
other updates are added to the base's weights. No pickle is run.
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
from safetensors import SafetensorError

from trainer import environment, layouts, registry, sampler
from trainer.adapters.textual_inversion import Concept, TextualInversion
from trainer.args import ModelArgs, TextArgs, TrainArgs
from trainer.export import embedding_name
from trainer.models import FAMILIES, sniff
from trainer.rundir import RunDir
from trainer.types import ModelFamily

COG_EMBEDDINGS = "embeddings.pti"  # beside lora.safetensors, of cog-sdxl
LORA = "learned"  # the name of the LoRA inside the pipeline
PICKLES = (".pth", ".ckpt", ".pkl", ".pickle")


class GenerateError(ValueError):
    """Weights that cannot be used, or that do not fit the base. One sentence."""


@dataclass(frozen=True)
class Weights:
    """What to put on a base."""

    lora: Path | None  # a file, or a folder of PEFT with several parts
    embeddings: Mapping[str, Path]  # by the trigger that each stands for
    model: ModelArgs  # the base that it was trained on, where that is known


def find(path: Path, base: str | None = None, trigger: str | None = None) -> Weights:
    """The weights at `path`: a run directory, a folder of PEFT, diffusers or cog-sdxl, or a file.

    A LoRA file brings the embeddings of its name beside it, and one of cog-sdxl its embeddings.pti.

    Args:
        base: overrides the base that the run was trained on; needed for a file unless the default base fits.
        trigger: overrides the trigger that the file names; of several embeddings each keeps its own.
    """
    if path.is_dir() and (path / "args.json").is_file():
        return _of_run(RunDir.open(path), base, trigger)
    if path.suffix.lower() in PICKLES:
        raise GenerateError(f"{path} is a pickle, which could run code when it is read; convert it to .safetensors")
    model = ModelArgs.model_validate({"base": base} if base else {})
    try:
        files = layouts.files_of(path)
        alone = path.is_file() and layouts.is_embedding(path)
        lora = files[0][0] if len(files) == 1 else path
        embeddings = [path] if alone else _beside(lora)
        return Weights(None if alone else lora, _by_trigger(embeddings, trigger), model)
    except layouts.LayoutError as error:
        raise GenerateError(str(error)) from error


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
        self._lora = False
        self._merged: layouts.Merged | None = None
        try:
            self._lora = weights.lora is not None and layouts.is_plain_lora(weights.lora, self.family)
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
            if isinstance(error, layouts.LayoutError):
                raise GenerateError(str(error)) from error
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
    keys = list(layouts.Opened(path))
    pipe = family.pipeline()
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=LORA, local_files_only=True)
    wanted = sum(key.endswith((".lora_down.weight", ".lora_A.weight")) for key in keys)
    modules = (module for root in (family.denoiser, *family.text_encoders.values()) for module in root.modules())
    taken = sum(LORA in getattr(module, "lora_A", {}) for module in modules)
    if taken != wanted or not wanted:
        raise GenerateError(f"{path} holds updates of {wanted} layers, and the base took {taken}; is it another base?")


def _put_rows(family: ModelFamily, paths: Mapping[str, Path]) -> None:
    loaded = {trigger: layouts.read_embedding(path, family, trigger) for trigger, path in paths.items()}
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
            f"{encoder}.rows": torch.cat([loaded[trigger][encoder] for trigger in rows.triggers])
            for encoder in family.text_encoders
        }
    )


def _beside(lora: Path) -> list[Path]:
    """The embeddings that belong to a LoRA file: of its own name, or of the one run whose files its folder holds."""
    if lora.name == "lora.safetensors" and (lora.parent / COG_EMBEDDINGS).is_file():
        return [lora.parent / COG_EMBEDDINGS]
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
    return [one] if one.is_file() else [path for path in several if _facts(path).get("modelspec.title") == name]


def _facts(path: Path) -> dict[str, str]:
    """The metadata; none of a pickle."""
    return layouts.Opened(path).metadata if path.suffix.lower() == ".safetensors" else {}


def _by_trigger(paths: Sequence[Path], trigger: str | None) -> dict[str, Path]:
    """The embeddings by the trigger that each file names, or that was chosen for the only one."""
    if trigger is not None and len(paths) > 1:
        raise GenerateError(
            f"a trigger was chosen ({trigger!r}), and there are {len(paths)} embeddings "
            f"({', '.join(path.name for path in paths)}); give one of the files alone, or no trigger"
        )
    if len(paths) == 1 and (several := layouts.triggers_of(paths[0])):
        if trigger is not None and len(several) > 1:
            raise GenerateError(f"{paths[0]} has the triggers {', '.join(several)}; give no other")
        return dict.fromkeys([trigger] if trigger else several, paths[0])
    found = {trigger or _facts(path).get("modelspec.trigger_phrase", "TOK"): path for path in paths}
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
