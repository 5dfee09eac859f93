"""What training changed about a layer's weight, in each of its forms, and the arithmetic that makes weights of it.

Shapes: o i output and input channels of a layer, (k k) a kernel, r the rank. A weight W is [o, i] or [o, i, k, k].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraTensors:
    """V = W + alpha / r * up @ down; down [r, i(, k, k)], up [o, r(, 1, 1)]. W' is V, or V at other lengths (DoRA).

    `magnitude` are the lengths: [1, i(, 1, 1)] of V's columns, or [o, 1(, 1, 1)] of its rows (arXiv 2402.09353).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class LohaTensors:
    """W' - W = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise; _a [o, r], _b [r, i k k] (arXiv 2108.06098)."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float


@dataclass(frozen=True)
class LokrTensors:
    """W' - W = scale * kron(w1, w2), each whole or as two factors (arXiv 2309.14859).

    w1 [o1, i1]; w2 [o2, i2(, k, k)], or as factors [o2, r], [r, i2 k k]; o = o1 o2, i = i1 i2.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float


@dataclass(frozen=True)
class Difference:
    """W' - W itself, and of the bias where that is trained, too."""

    weight: Tensor
    bias: Tensor | None = None


Update = LoraTensors | LohaTensors | LokrTensors | Difference


def difference(update: Update, weight: Tensor) -> Tensor:
    """W' - W in float32, of the shape of `weight`, with gradients to what `update` holds.

    Raises:
        ValueError: the update is of another layer's shape.
    """
    if isinstance(update, LoraTensors):
        rank = update.down.shape[0]
        change = update.alpha / rank * (update.up.float().flatten(1) @ update.down.float().flatten(1))
        if update.magnitude is not None:
            return _at_lengths(weight.float(), _shaped(change, weight), update.magnitude.float())
    elif isinstance(update, LohaTensors):
        change = (update.w1_a.float() @ update.w1_b.float()) * (update.w2_a.float() @ update.w2_b.float())
        change = update.alpha / update.w1_b.shape[0] * change
    elif isinstance(update, LokrTensors):
        change = update.scale * _kron(_whole(update.w1), _whole(update.w2), weight)
    else:
        change = update.weight.float()
    return _shaped(change, weight)


def lengths(weight: Tensor, *, of_rows: bool) -> Tensor:
    """Norms of the columns [1, i(, 1, 1)] or of the rows [o, 1(, 1, 1)] of a weight; never 0."""
    over = [axis for axis in range(weight.ndim) if axis != (0 if of_rows else 1)]
    return torch.linalg.vector_norm(weight, dim=over, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)


def _at_lengths(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """m V / |V| - W, exactly 0 where nothing changed. |V| is no path for gradients (section 4.3 of the paper)."""
    if magnitude.ndim != weight.ndim:
        raise ValueError(f"lengths of shape {list(magnitude.shape)} are not those of a weight {list(weight.shape)}")
    of_rows = magnitude.shape[0] == weight.shape[0] and magnitude.shape[1] == 1
    ratio = magnitude / lengths(weight + change.detach(), of_rows=of_rows)
    return (ratio - 1) * weight + ratio * change


def _whole(factors: tuple[Tensor, ...]) -> Tensor:
    return factors[0].float() if len(factors) == 1 else factors[0].float() @ factors[1].float()


def _kron(w1: Tensor, w2: Tensor, weight: Tensor) -> Tensor:
    """Of the first two axes; the kernel is w2's."""
    kernel = weight.shape[2:]
    w2 = w2.reshape(w2.shape[0], -1, *kernel)
    return torch.kron(w1.reshape(*w1.shape, *[1] * len(kernel)), w2)


def _shaped(change: Tensor, weight: Tensor) -> Tensor:
    if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
        raise ValueError(f"an update of {list(change.shape)} does not fit a weight of {list(weight.shape)}")
    return change.reshape(weight.shape)


def nearest_lora(change: Tensor, rank: int) -> tuple[LoraTensors, float]:
    """The LoRA of that rank that is nearest to W' - W (Eckart and Young: its largest singular values), at scale 1.

    A rank above what the weight can have is lowered to that.

    Returns:
        It, in float32, and how far it is: |W' - W - alpha / r * up @ down| / |W' - W|, 0 where nothing changed.
    """
    o, *rest = change.shape
    rank = min(rank, o, change[0].numel())
    u, values, vh = torch.linalg.svd(change.float().flatten(1), full_matrices=False)
    root = values[:rank].sqrt()
    down = (root[:, None] * vh[:rank]).reshape(rank, *rest)
    up = (u[:, :rank] * root).reshape(o, rank, *[1] * len(rest[1:]))
    norm = torch.linalg.vector_norm(values)
    off = torch.linalg.vector_norm(values[rank:]) / norm if norm else norm
    return LoraTensors(down, up, float(rank)), float(off)
