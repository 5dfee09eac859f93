"""merge: several files of updates into one, or into a checkpoint, each with a strength that may differ by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trainer import layouts
from trainer.models.skeleton import Skeleton
from trainer.progress import Progress
from trainer.tools import lowrank
from trainer.tools.bases import Base, Key
from trainer.tools.files import ToolError, Updates, dtype_of, facts_of, kind, save
from trainer.tools.lowrank import Cut, Size
from trainer.updates import Difference, LoraTensors, Update, difference

GIVEN = re.compile(r"(?P<path>.+?)(=(?P<strength>[-+.\deE]+)(?P<layers>(,[^,=]+=[-+.\deE]+)*))?")


@dataclass(frozen=True)
class Given:
    """A file with its strength, and other strengths for layers that a pattern finds."""

    path: Path
    strength: float = 1.0
    layers: Mapping[str, float] = field(default_factory=dict[str, float])  # regular expression -> strength

    @classmethod
    def parse(cls, text: str) -> Given:
        """`style.safetensors=0.8,up_blocks=0.3,text_encoder=0`."""
        found = GIVEN.fullmatch(text)
        assert found is not None
        try:
            pairs = [part.rpartition("=") for part in (found["layers"] or "").split(",") if part]
            layers = {pattern: float(strength) for pattern, _, strength in pairs}
            for pattern in layers:
                re.compile(pattern)
            return cls(Path(found["path"]), float(found["strength"] or 1.0), layers)
        except (ValueError, re.error) as error:
            raise ToolError(
                f"{text!r} is not FILE, FILE=STRENGTH or FILE=STRENGTH,PATTERN=STRENGTH: {error}"
            ) from error

    def of(self, component: str, path: str) -> float:
        """The strength of the first pattern that is found in `component.path`; else that of the file."""
        name = f"{component}.{path}"
        return next((own for pattern, own in self.layers.items() if re.search(pattern, name)), self.strength)


Parts = dict[tuple[str, str], list[tuple[Update, float]]]  # layer -> its updates with their strengths


def gathered(given: Sequence[Given], bones: Skeleton) -> Parts:
    """Every file's updates by layer; strength 0 leaves one out.

    Raises:
        LayoutError: a file cannot be read.
        ToolError: a pattern finds no layer that its file changes.
    """
    parts: Parts = {}
    for one in given:
        updates = layouts.read(one.path, bones)
        for pattern in one.layers:
            if not any(re.search(pattern, ".".join(key)) for key in updates):
                raise ToolError(
                    f"{one.path} changes no layer with {pattern!r} in its name, such as {_example(updates)}"
                )
        for key, update in updates.items():
            if strength := one.of(*key):
                parts.setdefault(key, []).append((update, strength))
    if not parts:
        raise ToolError("every strength is 0, so there is nothing to merge")
    return parts


def _example(updates: Updates) -> str:
    return ".".join(next(iter(updates)))


def into_base(given: Sequence[Given], base: Base, bones: Skeleton, out: Path) -> int:
    """Writes a checkpoint with W + sum of strength (W' - W), each W' made of the base's own W, in the base's dtype.

    Returns:
        The number of layers that changed.
    """
    parts = gathered(given, bones)
    changed: set[Key] = set()
    for (component, path), own in parts.items():
        changed.add((component, path, "weight"))
        if any(isinstance(update, Difference) and update.bias is not None for update, _ in own):
            changed.add((component, path, "bias"))
    if absent := sorted(changed - set(base)):
        raise ToolError(f"{base.path} has no {' '.join(absent[0])}")

    def change(key: Key, tensor: Tensor) -> Tensor:
        total = tensor.float()
        for update, strength in parts[key[:2]]:
            if key[2] == "weight":
                total = total + strength * difference(update, tensor.float())
            elif isinstance(update, Difference) and update.bias is not None:
                total = total + strength * update.bias
        found = total.to(tensor.dtype)
        if not bool(found.float().isfinite().all()):
            raise ToolError(f"{' '.join(key)} would have numbers that {tensor.dtype} cannot hold; lower the strengths")
        return found

    base.write(out, changed, change)
    return len(parts)


def into_one(
    given: Sequence[Given],
    bones: Skeleton,
    out: Path,
    layout: str,
    *,
    size: Size | None = None,
    base: Base | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Cut | None]:
    """Writes one file whose change is the sum of strength (W' - W).

    Without a `size` nothing is approximated: LoRAs are joined, and differences are added. With it every matrix's sum
    becomes the LoRA that is nearest to it.

    Args:
        base: what DoRA adds to; needed for it, and to no other kind.

    Returns:
        Layer -> how it was cut; None where it was not.
    """
    parts = gathered(given, bones)
    roots = {"denoiser": bones.denoiser, **bones.text_encoders}
    merged: dict[tuple[str, str], Update] = {}
    cuts: dict[str, Cut | None] = {}
    with Progress("merging", len(parts), "layer") as progress:
        for key, own in parts.items():
            shape = roots[key[0]].get_submodule(key[1]).get_parameter("weight").shape
            found = _summed(key, own, shape, size, base)
            merged[key] = found.lora if isinstance(found, Cut) else found
            cuts[" ".join(key)] = found if isinstance(found, Cut) else None
            progress.advance()
    save(out, layout, merged, bones, dtype or dtype_of(given[0].path), facts_of(merged, bones))
    return cuts


def _summed(
    key: tuple[str, str], own: Sequence[tuple[Update, float]], shape: torch.Size, size: Size | None, base: Base | None
) -> Update | Cut:
    pairs = [(update, strength) for update, strength in own if isinstance(update, LoraTensors)]
    if len(pairs) == len(own) and all(lowrank.plain(update) for update, _ in own):
        whole = lowrank.joined(pairs)
        return lowrank.cut(whole, size) if size else whole
    matrix = len(shape) > 1
    if not (size and matrix) and not all(isinstance(update, Difference) for update, _ in own):
        kinds = ", ".join(sorted({kind(update) for update, _ in own}))
        raise ToolError(
            f"{' '.join(key)} has {kinds}, whose sum no file holds exactly; give --rank or --energy for the nearest "
            "LoRA, or --into a base"
        )
    weight = torch.zeros(shape)
    if any(kind(update) == "dora" for update, _ in own):
        if base is None:
            raise ToolError(f"what the DoRA at {' '.join(key)} adds depends on the weights: give the base with --base")
        weight = base.tensor((*key, "weight")).float()
    total = sum((strength * difference(update, weight) for update, strength in own), torch.zeros(shape))
    if size and matrix:
        return lowrank.nearest(total, size)
    biases = [strength * up.bias for up, strength in own if isinstance(up, Difference) and up.bias is not None]
    return Difference(total, sum(biases[1:], biases[0]) if biases else None)
