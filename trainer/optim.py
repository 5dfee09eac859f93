"""Optimizers by name, and learning rates as pure functions of progress.

Each component (the adapter, the token rows) has an optimizer of its own, with one parameter group for each "scale":
the factor by which its parameters learn faster than the rest (LoRA+), which `set_lr` multiplies the rate with.
Progress f is finished updates / all updates, in 0..1. A rate is always set, never multiplied.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from trainer.args import ComponentOptim

log = logging.getLogger(__name__)

Groups = list[dict[str, Any]]  # {"params": [(name, parameter), ...], "scale": factor of the rate}

PIVOT = 0.7  # progress at which the rows stop for good
ADAPTER_RISE = 0.3  # progress at which the adapter's rate peaks, unless warmup says otherwise


def _adamw(args: ComponentOptim, parameters: Groups) -> Optimizer:
    return AdamW(parameters, lr=args.lr, betas=args.betas, eps=1e-8, weight_decay=args.weight_decay)


def _prodigy(args: ComponentOptim, parameters: Groups) -> Optimizer:
    """arXiv 2306.06101, with bias correction, and with the rate left out of the estimate's denominator.

    The latter (safeguard_warmup) keeps the estimate of d sound while a curve rises from a small rate.
    """
    from prodigyopt import Prodigy  # only runs that use it pay for the import

    if len(parameters) > 1:
        scales = ", ".join(f"{group['scale']:g}" for group in parameters)
        raise ValueError(
            f"prodigy finds one rate for all parameters, but they should learn {scales} times as fast as one another; "
            "take another optimizer, or leave the ratio at 1"
        )
    if args.lr < 0.1:
        log.warning(
            "prodigy multiplies the rate that it finds by lr, and lr is %g: training will be slow; give 1", args.lr
        )
    optimizer: Any = Prodigy(
        parameters, lr=args.lr, betas=args.betas, eps=1e-8, use_bias_correction=True, safeguard_warmup=True
    )
    for group in optimizer.param_groups:  # not through the constructor, which prints when there is a decay
        group["weight_decay"] = args.weight_decay
    return optimizer


OPTIMIZERS: dict[str, Callable[[ComponentOptim, Groups], Optimizer]] = {"adamw": _adamw, "prodigy": _prodigy}


def build(
    args: ComponentOptim,
    parameters: Iterable[tuple[str, nn.Parameter]],
    scales: Mapping[str, float] | None = None,
) -> Optimizer:
    """The optimizer of one component, with groups that know their parameters by name.

    Args:
        scales: by name, how many times as fast as the rest a parameter learns; 1 for those that are not named.

    Raises:
        ValueError: there is nothing to train, or the optimizer has one rate for all and `scales` would need several.
    """
    groups: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        groups.setdefault(float((scales or {}).get(name, 1.0)), []).append((name, parameter))
    if not groups:
        raise ValueError(f"{args.name} was given no parameters to train")
    return OPTIMIZERS[args.name](args, [{"params": named, "scale": scale} for scale, named in groups.items()])


def lr_at(args: ComponentOptim, progress: float) -> float:
    """The learning rate at `progress`."""
    return args.lr * CURVES[args.curve](progress, args.warmup)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Put `lr` in force, times its scale in each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def effective_lr(optimizer: Optimizer) -> float:
    """The step size in force at scale 1: lr, and for Prodigy d * lr, d being the rate that it found."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / float(group["scale"]) * float(group.get("d", 1.0))


def _rise(f: float, warmup: float) -> float:
    """Straight up from 0 to 1 over the first `warmup` of the run."""
    return f / warmup if f < warmup else 1.0


def _left(f: float, warmup: float) -> float:
    """Progress through what follows the warmup, 0..1."""
    return max(0.0, (f - warmup) / (1.0 - warmup))


def _constant(f: float, warmup: float) -> float:
    return _rise(f, warmup)


def _linear(f: float, warmup: float) -> float:
    return _rise(f, warmup) * (1.0 - _left(f, warmup))


def _cosine(f: float, warmup: float) -> float:
    return _rise(f, warmup) * 0.5 * (1.0 + math.cos(math.pi * _left(f, warmup)))


def _pivot_rows(f: float, warmup: float) -> float:
    """The rows' half of the adaptive pivot: fast at first, falling as (1 - f)^1.7, and off after 0.7."""
    return 0.0 if f > PIVOT else _rise(f, warmup) * (1.0 - f) ** 1.7


def _pivot_adapter(f: float, warmup: float) -> float:
    """The adapter's half: exponentially from 1/6 to 1 while the rows settle, then a cosine to 0."""
    rise = warmup or ADAPTER_RISE
    return (1.0 / 6.0) ** (1.0 - f / rise) if f < rise else _cosine(f, rise)


CURVES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "pivot_rows": _pivot_rows,
    "pivot_adapter": _pivot_adapter,
}
