"""The tensors that a file has for one layer -> its update: which kind they are, and that they fit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, Update

LORA = {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "lora_magnitude_vector"}
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}


def update_of(ends: Mapping[str, Tensor], said: tuple[float, float] | None, shape: tuple[int, ...]) -> Update:
    """The update that a layer's tensors are.

    Args:
        ends: of `keys.ENDS`.
        said: alpha and rank where no tensor says alpha [default: the scale is 1].
        shape: of the layer's weight.

    Raises:
        ValueError: they are none that is understood, do not fit each other, or do not fit the weight.
    """
    have = ends.keys() - {"alpha"}
    if {"lora_down.weight", "lora_up.weight"} <= have <= LORA:
        return _lora(ends, said, shape)
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= have <= LOHA and _both(have, "hada_t1", "hada_t2"):
        return _loha(ends, said, shape)
    if "diff" in have and have <= {"diff", "diff_b"}:
        if ends["diff"].numel() != math.prod(shape) or ends["diff"].shape[0] != shape[0]:
            raise ValueError(f"a difference of {list(ends['diff'].shape)} does not fit a weight of {list(shape)}")
        return Difference(ends["diff"].reshape(shape), ends.get("diff_b"))
    w1, w2 = _factors(ends, "lokr_w1"), _factors(ends, "lokr_w2")
    if w1 and w2 and len(w1) + len(w2) == len(have - {"lokr_t2"}):
        return _lokr(ends, said, shape)
    if "dora_scale" in have:
        raise ValueError(f"{', '.join(sorted(have))}: lengths (DoRA) are understood of a LoRA only")
    raise ValueError(f"{', '.join(sorted(have))} are no update that is understood")


def _both(have: set[str], *names: str) -> bool:
    return len(have & set(names)) in (0, len(names))


def _alpha(ends: Mapping[str, Tensor], said: tuple[float, float] | None, rank: int) -> float:
    if "alpha" in ends:
        return _number(ends["alpha"])
    if said is None:
        return float(rank)
    return said[0] if said[1] == rank else said[0] / said[1] * rank


def _number(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"alpha is a tensor of {list(tensor.shape)}, and must be one number")
    return float(tensor)


def _lora(ends: Mapping[str, Tensor], said: tuple[float, float] | None, shape: tuple[int, ...]) -> LoraTensors:
    down, up = ends["lora_down.weight"], ends["lora_up.weight"]
    if "lora_mid.weight" in ends:  # Tucker: a kernel between the two, which joins the lower one exactly
        mid = ends["lora_mid.weight"]
        if mid.ndim != 4 or mid.shape[1] != down.shape[0] or mid.shape[0] != up.shape[1]:
            raise ValueError(f"lora_mid of {list(mid.shape)} does not fit ranks {down.shape[0]} and {up.shape[1]}")
        down = torch.einsum("mnhw,ni->mihw", mid, down.flatten(1))
    rank = down.shape[0]
    if up.ndim < 2 or up.flatten(1).shape[1] != rank:
        raise ValueError(f"up of {list(up.shape)} does not fit down of {list(down.shape)}: their ranks differ")
    if up.shape[0] != shape[0] or down.numel() * shape[0] != rank * math.prod(shape):
        raise ValueError(f"down {list(down.shape)} and up {list(up.shape)} do not fit a weight of {list(shape)}")
    return LoraTensors(down, up, _alpha(ends, said, rank), _magnitude(ends, shape))


def _magnitude(ends: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """Lengths of rows as PEFT spells them; of rows or columns by their shape, as LyCORIS and OneTrainer do."""
    rest = [1] * (len(shape) - 1)
    if "lora_magnitude_vector" in ends:
        lengths = ends["lora_magnitude_vector"]
        if lengths.numel() != shape[0]:
            raise ValueError(f"lengths of {list(lengths.shape)} are not those of the rows of {list(shape)}")
        return lengths.reshape(shape[0], *rest)
    lengths = ends.get("dora_scale")
    if lengths is None:
        return None
    if lengths.ndim >= 2 and lengths.shape[0] == 1 and lengths.numel() == shape[1]:
        return lengths.reshape(1, shape[1], *rest[1:])
    if lengths.ndim >= 2 and lengths.numel() == lengths.shape[0] == shape[0]:
        return lengths.reshape(shape[0], *rest)
    raise ValueError(
        f"a dora_scale of {list(lengths.shape)} means different things to different programs; of a weight "
        f"{list(shape)} it must be [1, {shape[1]}], of columns, or [{shape[0]}, 1], of rows"
    )


def _loha(ends: Mapping[str, Tensor], said: tuple[float, float] | None, shape: tuple[int, ...]) -> LohaTensors:
    factors: list[Tensor] = []
    for n in (1, 2):
        a, b = ends[f"hada_w{n}_a"], ends[f"hada_w{n}_b"]
        if f"hada_t{n}" in ends:  # Tucker, which is the same with a longer second factor
            b = _through(ends[f"hada_t{n}"], b, a)
            a = a.T
        factors += [a, b]
    rank = factors[1].shape[0]
    for a, b in (factors[:2], factors[2:]):
        if a.shape != (shape[0], rank) or b.shape != (rank, math.prod(shape[1:])):
            raise ValueError(f"factors {list(a.shape)} and {list(b.shape)} do not fit a weight of {list(shape)}")
    return LohaTensors(*factors, alpha=_alpha(ends, said, rank))


def _through(kernel: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """[r, i k k] of LyCORIS's Tucker kernel [r, r, k, k], b [r, i]; a is [r, o]."""
    if kernel.ndim != 4 or kernel.shape[:2] != (a.shape[0], b.shape[0]):
        raise ValueError(f"a kernel of {list(kernel.shape)} does not fit ranks {a.shape[0]} and {b.shape[0]}")
    return torch.einsum("pqhw,qi->pihw", kernel, b).flatten(1)


def _lokr(ends: Mapping[str, Tensor], said: tuple[float, float] | None, shape: tuple[int, ...]) -> LokrTensors:
    w1, w2 = _factors(ends, "lokr_w1"), _factors(ends, "lokr_w2")
    if "lokr_t2" in ends:
        w2 = (w2[0].T, _through(ends["lokr_t2"], w2[1], w2[0]))
    ranks = [factors[1].shape[0] for factors in (w2, w1) if len(factors) == 2]
    if any(len(factors) == 2 and factors[0].shape[1] != factors[1].shape[0] for factors in (w1, w2)):
        raise ValueError("the factors' ranks differ")
    size = math.prod(math.prod(factors[0].shape[:1]) * factors[-1][0].numel() for factors in (w1, w2))
    if w1[0].shape[0] * w2[0].shape[0] != shape[0] or size != math.prod(shape):
        sides = " and ".join(str([list(factor.shape) for factor in factors]) for factors in (w1, w2))
        raise ValueError(f"the Kronecker product of {sides} does not fit a weight of {list(shape)}")
    if "alpha" in ends:  # programs take it only where a factor is of low rank
        return LokrTensors(w1, w2, _number(ends["alpha"]) / ranks[0] if ranks else 1.0)
    return LokrTensors(w1, w2, said[0] / said[1] if said else 1.0)


def _factors(ends: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """The matrix whole, or as its two factors; empty if it is neither."""
    if name in ends:
        return (ends[name],)
    pair = (f"{name}_a", f"{name}_b")
    return tuple(ends[key] for key in pair) if all(key in ends for key in pair) else ()
