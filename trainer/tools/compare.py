"""compare: two files tensor by tensor, or by what they change where they name things otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer import layouts
from trainer.layouts.container import Opened
from trainer.models.skeleton import Skeleton
from trainer.progress import Progress
from trainer.tools.files import Updates
from trainer.updates import Difference, LoraTensors, Update, difference


@dataclass(frozen=True)
class Row:
    """How two tensors of one name differ, as float32."""

    name: str
    largest: float  # |a - b|
    mean: float  # |a - b|
    cosine: float  # 1 where both are zero


@dataclass(frozen=True)
class Comparison:
    """Of two files."""

    rows: list[Row]  # what both have, the largest difference first
    only_first: list[str]
    only_second: list[str]
    shapes: list[str]  # of one name and another shape

    def differ(self, tolerance: float) -> bool:
        """Whether a number is further than `tolerance` from its counterpart, or has none."""
        lacks = self.only_first or self.only_second or self.shapes
        return bool(lacks) or any(not row.largest <= tolerance for row in self.rows)


def tensors(first: Path, second: Path) -> Comparison:
    """By the tensors' names."""
    a, b = Opened(first), Opened(second)
    both = [key for key in a if key in b and a.entries[key].shape == b.entries[key].shape]
    shapes = [
        f"{key} {list(a.entries[key].shape)} and {list(b.entries[key].shape)}"
        for key in a
        if key in b and a.entries[key].shape != b.entries[key].shape
    ]
    rows = _rows(both, lambda key: (a.tensor(key), b.tensor(key)))
    return Comparison(rows, sorted(set(a) - set(b)), sorted(set(b) - set(a)), shapes)


def updates(first: Path, second: Path, bones: Skeleton) -> Comparison:
    """By the layers, whatever the files call them, and what is added to their weights.

    Lengths of DoRA are compared as they are, beside the product, since what they add depends on the base.
    """
    a, b = layouts.read(first, bones), layouts.read(second, bones)
    one, two = _parts(a, bones), _parts(b, bones)
    rows = _rows(sorted(one.keys() & two.keys()), lambda name: (one[name](), two[name]()))
    return Comparison(rows, sorted(one.keys() - two.keys()), sorted(two.keys() - one.keys()), [])


def _parts(given: Updates, bones: Skeleton) -> dict[str, Callable[[], Tensor]]:
    roots = {"denoiser": bones.denoiser, **bones.text_encoders}
    parts: dict[str, Callable[[], Tensor]] = {}
    for (component, path), update in given.items():
        shape = roots[component].get_submodule(path).get_parameter("weight").shape
        parts[f"{component} {path}"] = lambda update=update, shape=shape: _change(update, shape)
        if isinstance(update, LoraTensors) and update.magnitude is not None:
            parts[f"{component} {path} lengths"] = lambda lengths=update.magnitude: lengths
        if isinstance(update, Difference) and update.bias is not None:
            parts[f"{component} {path} bias"] = lambda bias=update.bias: bias
    return parts


def _change(update: Update, shape: torch.Size) -> Tensor:
    if isinstance(update, LoraTensors):
        update = LoraTensors(update.down, update.up, update.alpha)
    return difference(update, torch.zeros(shape))


def _rows(names: Iterable[str], pair: Callable[[str], tuple[Tensor, Tensor]]) -> list[Row]:
    names = list(names)
    rows: list[Row] = []
    with Progress("comparing", len(names), "tensor") as progress:
        for name in names:
            a, b = (tensor.double() for tensor in pair(name))
            off = (a - b).abs()
            norms = float(a.norm() * b.norm())
            same = bool(torch.equal(a, b))
            cosine = 1.0 if same else float((a * b).sum()) / norms if norms else 0.0
            largest, mean = (float(off.max()), float(off.mean())) if off.numel() else (0.0, 0.0)
            rows.append(Row(name, largest, mean, cosine))
            progress.advance()
    return sorted(rows, key=lambda row: -row.largest if row.largest == row.largest else float("-inf"))
