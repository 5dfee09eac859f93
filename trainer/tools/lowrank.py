"""Updates as products of two matrices of low rank, and sums of them.

Shapes: o i output and input channels of a layer, (k k) a kernel, R the rank before and r after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.updates import LoraTensors, Update


@dataclass(frozen=True)
class Size:
    """How large a rank may be: a number, or what keeps a share of the energy (the sum of squared numbers)."""

    rank: int | None = None
    energy: float | None = None  # 0..1

    def of(self, values: Tensor) -> int:
        """The rank, 1 at least, for singular values in falling order."""
        limit = len(values) if self.rank is None else min(self.rank, len(values))
        if self.energy is None:
            return limit
        kept = values.double().square().cumsum(0)
        enough = int((kept < self.energy * kept[-1]).sum()) + 1
        return max(1, min(limit, enough))


@dataclass(frozen=True)
class Cut:
    """A LoRA that is nearest to a change among those of its rank, and the share of the energy that it has."""

    lora: LoraTensors
    energy: float  # 0..1; 1 where nothing was changed


def plain(update: Update) -> bool:
    """Whether it is a product of two matrices and nothing else."""
    return isinstance(update, LoraTensors) and update.magnitude is None


def factors(update: LoraTensors, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """up [o, R] and down [R, i k k], whose product is `strength` times the change."""
    scale = strength * update.alpha / update.down.shape[0]
    return update.up.float().flatten(1) * scale, update.down.float().flatten(1)


def joined(parts: Sequence[tuple[LoraTensors, float]]) -> LoraTensors:
    """The sum of several, each times its strength: exact, of the sum of their ranks, at scale 1."""
    pairs = [factors(update, strength) for update, strength in parts]
    first = parts[0][0]
    down, up = torch.cat([down for _, down in pairs]), torch.cat([up for up, _ in pairs], dim=1)
    shaped_down = down.reshape(len(down), *first.down.shape[1:])
    shaped_up = up.reshape(*up.shape, *[1] * (first.up.ndim - 2))
    return LoraTensors(shaped_down, shaped_up, float(len(down)))


def cut(update: LoraTensors, size: Size) -> Cut:
    """The same at a smaller rank, by the singular values of the product, which is never multiplied out."""
    up, down = factors(update)
    if up.shape[1] > min(len(up), down.shape[1]):
        return nearest((up @ down).reshape(len(up), *update.down.shape[1:]), size)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, values, vh = torch.linalg.svd(r_up @ r_down.T)
    return _cut(q_up @ u, values, vh @ q_down.T, size, update.down.shape[1:], update.up.ndim - 2)


def nearest(change: Tensor, size: Size) -> Cut:
    """The LoRA that is nearest to a change [o, i(, k, k)] (Eckart and Young: its largest singular values)."""
    u, values, vh = torch.linalg.svd(change.float().flatten(1), full_matrices=False)
    return _cut(u, values, vh, size, change.shape[1:], change.ndim - 2)


def _cut(u: Tensor, values: Tensor, vh: Tensor, size: Size, sides: Sequence[int], kernel: int) -> Cut:
    rank = size.of(values)
    root = values[:rank].sqrt()
    down = (root[:, None] * vh[:rank]).reshape(rank, *sides)
    up = (u[:, :rank] * root).reshape(len(u), rank, *[1] * kernel)
    total = float(values.double().square().sum())
    energy = float(values[:rank].double().square().sum()) / total if total else 1.0
    return Cut(LoraTensors(down, up, float(rank)), energy)
