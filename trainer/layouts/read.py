"""Updates from files of many programs (docs/imports.md), all of a file understood or refused. No pickle is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.args import TrainArgs
from trainer.layouts import keys
from trainer.layouts.container import LayoutError, Opened
from trainer.layouts.forms import update_of
from trainer.layouts.kinds import kind_of
from trainer.rundir import RunDir, RunDirError
from trainer.types import HasSpellings, Modular
from trainer.updates import Update

PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
IN_FOLDERS = ("lora.safetensors", "pytorch_lora_weights.safetensors")  # cog-sdxl; diffusers
PEFT_KINDS = ("LORA", "LOHA", "LOKR")
LISTED = 5  # of what was not understood


def files_of(given: str | Path) -> Sequence[tuple[Path, str | None]]:
    """The .safetensors files that a path means, each with the component that its tensors are of, if a name says that.

    A path is a file, a run directory that exported, or a folder of PEFT, diffusers or cog-sdxl. A folder of PEFT may
    hold one for each component: unet, text_encoder, text_encoder_2.

    Raises:
        LayoutError: there is none.
    """
    path = Path(given)
    if not path.is_dir():
        if not path.is_file():
            raise LayoutError(f"{path} does not exist; give a .safetensors file, a run directory or a PEFT folder")
        return [(path, None)]
    if (path / "args.json").is_file():
        return [(_exported(path), None)]
    parts = {path / name / PEFT: name for name in ("unet", "text_encoder", "text_encoder_2")}
    several = [(file, "denoiser" if part == "unet" else part) for file, part in parts.items() if file.is_file()]
    named = {"unet": "denoiser", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}.get(path.name)
    if (path / PEFT).is_file():
        return [(path / PEFT, named)]
    alone = [(path / name, None) for name in IN_FOLDERS if (path / name).is_file()]
    if not several and len(alone) != 1:
        pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in (".bin", ".pt", ".ckpt")]
        also = f"; {pickles[0]} is a pickle, which is not read" if pickles else ""
        raise LayoutError(
            f"{path} is no run directory and holds none of {', '.join((PEFT, *IN_FOLDERS))}; give the file{also}"
        )
    return several or alone


def _exported(path: Path) -> Path:
    """The file of updates that a run directory exported."""
    try:
        run = RunDir.open(path)
        name = TrainArgs.model_validate_json(run.args.read_text(encoding="utf-8")).runtime.name
    except (RunDirError, ValueError, OSError) as error:
        raise LayoutError(f"{path} is a folder, but no run directory of this version: {error}") from error
    file = run.export / f"{name}.safetensors"
    if not file.is_file():
        raise LayoutError(f"{path} has exported no {file.name}; finish the run, or give a file")
    return file


def read(given: str | Path, family: Modular) -> dict[tuple[str, str], Update]:
    """(component, module path) -> update, in float32, of all that the path means (`files_of`).

    Raises:
        LayoutError: a file is damaged, or holds what is not understood, or what this family has no layer for.
    """
    found: dict[tuple[str, str], Update] = {}
    for path, component in files_of(given):
        own = _Reader(path, family, component).updates()
        if twice := found.keys() & own.keys():
            raise LayoutError(f"{given} changes {len(twice)} layers twice, {' '.join(min(twice))} for one")
        found |= own
    return found


@dataclass(frozen=True)
class Place:
    """Where a layer is, and the shape of its weight."""

    component: str
    path: str
    shape: tuple[int, ...]


def places(family: Modular) -> dict[str, Place]:
    """Every name that a layer may have in a file -> the layer. Names that could be two layers' are left out."""
    found: dict[str, Place] = {}
    twice: set[str] = set()
    for component, path, shape in _layers(family):
        others = family.spellings(component, path) if isinstance(family, HasSpellings) else ()
        for name in {family.clients.kohya(component, path), family.clients.diffusers(component, path), *others}:
            twice |= {name} & found.keys()
            found[name] = Place(component, path, shape)
    return {name: place for name, place in found.items() if name not in twice}


def _layers(family: Modular) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(component, path, shape of the weight) of every layer that has one."""
    for component, root in {"denoiser": family.denoiser, **family.text_encoders}.items():
        for path, module in root.named_modules():
            own = path.removesuffix(".base_layer")  # where an adapter's layer stands in the place of the base's
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if own and weight is not None:
                yield component, own, tuple(weight.shape)


class _Reader:
    """One file."""

    def __init__(self, path: Path, family: Modular, component: str | None) -> None:
        self._path, self._family, self._component = path, family, component
        self._file = Opened(path)
        self._said = Said.beside(self._file)

    def updates(self) -> dict[tuple[str, str], Update]:
        groups = self._groups()
        places = self._located(groups)
        found: dict[tuple[str, str], Update] = {}
        for name, ends in groups.items():
            place = places[name]
            tensors = {end: self._file.finite(key).float() for end, key in ends.items()}
            try:
                update = update_of(tensors, self._said.of(name, tensors), place.shape)
            except ValueError as error:
                raise LayoutError(f"{self._path} at {name}: {error}{self._looks()}") from error
            if (place.component, place.path) in found:
                raise LayoutError(f"{self._path} changes {place.component} {place.path} under two names")
            found[place.component, place.path] = update
        return found

    def _groups(self) -> dict[str, dict[str, str]]:
        """Layer's name -> end -> key."""
        if not len(self._file):
            raise LayoutError(f"{self._path} holds nothing")
        groups: dict[str, dict[str, str]] = {}
        strange: list[str] = []
        for key in self._file:
            name, end = keys.split(key) or ("", "")
            if not end or end in groups.get(name, {}):
                strange.append(key)
            else:
                groups.setdefault(name, {})[end] = key
        if strange:
            raise LayoutError(
                f"{self._path} holds {len(strange)} tensors that are not understood: {', '.join(strange[:LISTED])}"
                + self._hint(strange)
            )
        return groups

    def _hint(self, strange: list[str]) -> str:
        if all(key.startswith(keys.BUNDLED) for key in strange):
            return "; embeddings inside a LoRA file are not read: save them as a file of their own"
        if len(strange) == len(self._file) and any(key.startswith("model.diffusion_model.") for key in strange):
            return "; this is a whole checkpoint, not an update of one"
        return ""

    def _located(self, groups: Mapping[str, object]) -> dict[str, Place]:
        known = places(self._family)
        if self._component is not None:  # bare paths, which could be any component's
            own = {place for place in known.values() if place.component == self._component}
            flat = {place.path.removeprefix("text_model."): place for place in own}
            known = flat | {f"text_model.{path}": place for path, place in flat.items()}
        homeless = sorted(groups.keys() - known.keys())
        if homeless:
            raise LayoutError(
                f"{self._path} changes {len(homeless)} layers that the base has not ({', '.join(homeless[:3])})"
                + (self._looks() or "; is it for another kind of base?")
            )
        return {name: known[name] for name in groups}

    def _looks(self) -> str:
        kind = kind_of(self._file.entries)
        return f"; the file looks like one for {kind}" if kind else ""


class Said:
    """What a file or the config beside it says of alpha, where its tensors do not: by component's prefix, or of all."""

    def __init__(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        self._facts = facts

    @classmethod
    def beside(cls, file: Opened) -> Said:
        """Of PEFT's config in the same folder, or of what diffusers writes into the metadata."""
        config = file.path.parent / PEFT_CONFIG
        if file.path.name == PEFT and config.is_file():
            own = _object(config, config.read_text(encoding="utf-8"))
            kind = own.get("peft_type")
            if kind not in PEFT_KINDS or own.get("fan_in_fan_out"):
                raise LayoutError(f"{config} is of a {kind}, and of PEFT's kinds {', '.join(PEFT_KINDS)} are read")
            return cls({"": own})
        flat = _object(file.path, file.metadata.get("lora_adapter_metadata", "{}"))
        by_prefix: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            prefix, _, name = key.partition(".")
            by_prefix.setdefault(prefix, {})[name] = value
        return cls(by_prefix)

    def of(self, name: str, ends: Mapping[str, Tensor]) -> tuple[float, float] | None:
        """(alpha, rank) of a layer's update, whose scale is their ratio; None: nothing says it."""
        prefix, _, path = name.partition(".")
        own = self._facts.get("", self._facts.get(prefix))
        if own is None or "alpha" in ends:
            return None
        whole = name if "" in self._facts else path
        alpha = _matching(own.get("alpha_pattern"), whole, own.get("lora_alpha", own.get("alpha")))
        rank = _matching(own.get("rank_pattern"), whole, own.get("r"))
        if "lora_down.weight" in ends:
            rank = ends["lora_down.weight"].shape[0]
        if alpha is None or not rank:
            return None
        return (alpha * math.sqrt(rank) if own.get("use_rslora") else float(alpha)), float(rank)


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        found: Any = json.loads(text)
        return {str(key): value for key, value in found.items()}
    except (ValueError, AttributeError) as error:
        raise LayoutError(f"what {path} says of its adapter is no JSON object: {error}") from error


def _matching(patterns: Mapping[str, float] | None, path: str, otherwise: float | None) -> float | None:
    """As PEFT looks it up: a pattern is the end of a path."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", own) for own in (path, path.removeprefix("text_model."))):
            return float(value)
    return otherwise
