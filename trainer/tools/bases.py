"""Checkpoints on disk, single files or diffusers folders, by layer: a tensor is read when it is asked for, or written.

Shapes: a text tower of OpenCLIP (Stable Diffusion 2, XL) has queries, keys and values as rows of one tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.layouts.container import Entry, Opened, write
from trainer.models import original
from trainer.models.skeleton import Skeleton
from trainer.progress import Progress
from trainer.rundir import atomic_folder
from trainer.tools.files import ToolError

Key = tuple[str, str, str]  # component, module path, "weight" or "bias"
Change = Callable[[Key, Tensor], Tensor]  # a tensor of a layer -> what stands there instead
PROJECTION = "text_projection"
PARTS = {"denoiser": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}


@dataclass(frozen=True)
class Spot:
    """Rows of a tensor of a file."""

    file: Path
    name: str
    rows: slice
    turned: bool = False  # the projection of OpenCLIP is transposed

    def of(self, tensor: Tensor) -> Tensor:
        """A view of it."""
        return tensor[self.rows].T if self.turned else tensor[self.rows]


class Base:
    """The denoiser's and text encoders' tensors of a checkpoint, by layer."""

    def __init__(self, path: Path, bones: Skeleton) -> None:
        """Reads headers only.

        Raises:
            ToolError: it lacks a tensor that the family has.
            LayoutError: a file is damaged.
        """
        self.path = path
        self._files: dict[Path, Opened] = {}
        self._spots = self._single(bones) if path.is_file() else self._folder(bones)

    def __contains__(self, key: Key) -> bool:
        return key in self._spots

    def __iter__(self) -> Iterator[Key]:
        return iter(self._spots)

    def tensor(self, key: Key) -> Tensor:
        """In the file's dtype."""
        spot = self._spots[key]
        return spot.of(self._files[spot.file].finite(spot.name))

    def entry(self, key: Key) -> Entry:
        """Dtype and shape."""
        spot = self._spots[key]
        whole = self._files[spot.file].entries[spot.name]
        shape = (len(range(whole.shape[0])[spot.rows]), *whole.shape[1:])
        return Entry(whole.dtype, shape[::-1] if spot.turned else shape)

    def write(self, out: Path, changed: set[Key], change: Change) -> None:
        """The whole checkpoint as it is, but for `changed`, which `change` gives; one tensor at a time."""
        spots: dict[Path, dict[str, dict[Key, Spot]]] = {}
        for key in changed:
            spot = self._spots[key]
            spots.setdefault(spot.file, {}).setdefault(spot.name, {})[key] = spot
        total = sum(len(self._files[file]) for file in spots)
        with Progress("writing", total, "tensor") as progress:
            if self.path.is_file():
                if out.suffix != ".safetensors":
                    raise ToolError(f"--out is {out}, and a checkpoint in one file ends in .safetensors")
                self._rewrite(self.path, out, spots.get(self.path, {}), change, progress)
                return
            with atomic_folder(out) as folder:
                for file in sorted(self.path.rglob("*")):
                    to = folder / file.relative_to(self.path)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    if file in spots:
                        self._rewrite(file, to, spots[file], change, progress)
                    elif file.is_file():
                        shutil.copyfile(file, to)

    def _rewrite(
        self, file: Path, to: Path, spots: Mapping[str, Mapping[Key, Spot]], change: Change, progress: Progress
    ) -> None:
        opened = self._opened(file)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in opened:
                tensor = opened.tensor(name)
                for key, spot in spots.get(name, {}).items():
                    spot.of(tensor).copy_(change(key, spot.of(tensor)))
                yield name, tensor
                progress.advance()

        write(to, opened.entries, tensors(), opened.metadata)

    def _opened(self, file: Path) -> Opened:
        if file not in self._files:
            self._files[file] = Opened(file)
        return self._files[file]

    # --- where a layer's tensors are

    def _single(self, bones: Skeleton) -> dict[Key, Spot]:
        """Each row of the family's tensors is numbered; where the numbers are under the original names is the place."""
        numbered: dict[str, dict[str, Tensor]] = {}
        keys: list[Key] = []
        turned: dict[str, Key] = {}
        for key, shape in _layers(bones):
            if key[1] == PROJECTION:
                turned[next(iter(bones.original_towers[key[0]]({f"{PROJECTION}.weight": torch.zeros(1, 1)})))] = key
            else:
                numbered.setdefault(key[0], {})[f"{key[1]}.{key[2]}"] = torch.full((shape[0],), len(keys))
                keys.append(key)
        named = original.unet(numbered["denoiser"], bones.original_path)
        for component, tower in bones.original_towers.items():
            named |= tower(numbered[component])
        opened = self._opened(self.path)
        spots: dict[Key, Spot] = {}
        for name in (*named, *turned):
            if name not in opened:
                raise ToolError(f"{self.path} has no {name}; is it a whole checkpoint of {bones.name}?")
        for name, key in turned.items():
            spots[key] = Spot(self.path, name, slice(None), turned=True)
        for name, numbers in named.items():
            for number in numbers.unique().tolist():
                rows = (numbers == number).nonzero().flatten()
                spots[keys[number]] = Spot(self.path, name, slice(int(rows[0]), int(rows[-1]) + 1))
        return spots

    def _folder(self, bones: Skeleton) -> dict[Key, Spot]:
        held = {component: self._part(part) for component, part in PARTS.items() if (self.path / part).is_dir()}
        spots: dict[Key, Spot] = {}
        for (component, path, kind), shape in _layers(bones):
            flat = path.removeprefix("text_model.")
            names = (f"{path}.{kind}", f"{flat}.{kind}", f"text_model.{flat}.{kind}")
            found = next((name for name in names if name in held.get(component, {})), None)
            if found is None:
                raise ToolError(f"{self.path} has no {kind} of {component} {path}")
            spots[component, path, kind] = Spot(held[component][found], found, slice(0, shape[0]))
        return spots

    def _part(self, part: str) -> dict[str, Path]:
        """Name of a tensor -> its file, of one or of several that an index lists."""
        folder = self.path / part
        index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
        if index is not None:
            listed: Any = json.loads(index.read_text(encoding="utf-8"))
            files = sorted({folder / Path(str(name)).name for name in listed["weight_map"].values()})
        else:
            files = sorted(folder.glob("*.safetensors"))[:1]
        if not files:
            raise ToolError(f"{folder} holds no .safetensors weights")
        return {name: file for file in files for name in self._opened(file)}


def _layers(bones: Skeleton) -> Iterator[tuple[Key, tuple[int, ...]]]:
    """Tensors of layers that can have an update, with their shapes."""
    for component, root in {"denoiser": bones.denoiser, **bones.text_encoders}.items():
        for path, module in root.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                if kind in ("weight", "bias"):
                    yield (component, path, kind), tuple(parameter.shape)
