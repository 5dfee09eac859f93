"""Learning-rate curves: pure functions of progress f = finished updates / all updates, in 0..1, -> factor of the peak.

A warm-up rises from 0 (or, exponentially, from 1/6) to 1 over the first part of the run; the curve falls over what is
left of it, z in 0..1, down to `floor`. The pivots are the two halves of pivotal tuning: the rows learn first and stop,
the adapter rises as they settle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from trainer.args import PIVOTS, ComponentOptim, CurveArgs, OptimArgs

PIVOT = 0.7  # progress at which the rows of the adaptive pivot stop for good
ADAPTER_RISE = 0.3  # progress at which the adapter's rate peaks there, unless warmup says otherwise
RISE_FROM = 1.0 / 6.0  # of an exponential rise


def _constant(z: float, args: CurveArgs) -> float:
    return 1.0


def _linear(z: float, args: CurveArgs) -> float:
    return 1.0 - z


def _cosine(z: float, args: CurveArgs) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * z))


def _restarts(z: float, args: CurveArgs) -> float:
    """`cycles` cosines of equal length, each from the peak (arXiv 1608.03983 with T_mult 1); 0 at the end."""
    return 0.0 if z >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * ((args.cycles * z) % 1.0)))


def _polynomial(z: float, args: CurveArgs) -> float:
    return (1.0 - z) ** args.power


def _exponential(z: float, args: CurveArgs) -> float:
    """The same ratio from each update to the next; `fall` does not stretch it, for it ends at the floor by itself."""
    return args.floor**z


def _rex(z: float, args: CurveArgs) -> float:
    """arXiv 2107.04197: (1 - z) / (1/2 + (1 - z) / 2)."""
    return (1.0 - z) / (0.5 + 0.5 * (1.0 - z))


FALLS: dict[str, Callable[[float, CurveArgs], float]] = {
    "": _constant,  # of a component that nobody has chosen one for, see `filled`
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "restarts": _restarts,
    "polynomial": _polynomial,
    "exponential": _exponential,
    "rex": _rex,
}


def factor(args: CurveArgs, component: str, f: float, warmup: float, pivot: float) -> float:
    """Of the peak rate, at progress `f`.

    Args:
        component: "rows" or another; which half of a pivot is meant.
        warmup: fraction of the run, in 0..1.
        pivot: progress at which a hard pivot changes from the rows to the others.
    """
    rows = component == "rows"
    if args.curve == "pivot_rows" or (args.curve == "adaptive" and rows):
        return _pivot_rows(f, _rise(f, warmup, args))
    if args.curve in ("pivot_adapter", "adaptive"):
        return _pivot_adapter(f, warmup)
    if args.curve == "hard_pivot":
        return 0.0 if off(args, component, f, pivot) else _rise(f if rows else f - pivot, warmup, args)
    fall = FALLS[args.curve](_left(f, warmup), args)
    if args.curve != "exponential":
        fall = args.floor + (1.0 - args.floor) * fall
    return _rise(f, warmup, args) * fall


def filled(args: OptimArgs, trained: Collection[str], averaging: Collection[str]) -> OptimArgs:
    """With a curve for each component that has none.

    Rows and an adapter that learn together take turns: adaptive, or hard_pivot where the other one has that. Where
    one of them has a curve that is no pivot, or trains alone, the rest is constant.

    Args:
        trained: names of the run's components.
        averaging: those whose optimizers average, which is theirs in place of a falling curve.
    """
    given = {args.adapter.curve, args.rows.curve} - {""}
    usual = "constant"
    if {"adapter", "rows"} <= set(trained) and given <= set(PIVOTS):
        usual = "hard_pivot" if "hard_pivot" in given else "adaptive"
    sections = {name: section for name, section in args if isinstance(section, ComponentOptim)}
    curves = {name: section.curve or ("constant" if name in averaging else usual) for name, section in sections.items()}
    return args.model_copy(
        update={name: section.model_copy(update={"curve": curves[name]}) for name, section in sections.items()}
    )


def off(args: CurveArgs, component: str, f: float, pivot: float) -> bool:
    """Whether a hard pivot has this component frozen: rows from the pivot on, all others before it."""
    return args.curve == "hard_pivot" and (f >= pivot) == (component == "rows")


def _rise(f: float, warmup: float, args: CurveArgs) -> float:
    """Up to 1 over the first `warmup` of the run."""
    if f >= warmup:
        return 1.0
    return f / warmup if args.ramp == "linear" else RISE_FROM ** (1.0 - f / warmup)


def _left(f: float, warmup: float) -> float:
    """Progress through what follows the warmup, 0..1."""
    return max(0.0, (f - warmup) / (1.0 - warmup))


def _pivot_rows(f: float, rise: float) -> float:
    """The rows' half of the adaptive pivot: fast at first, falling as (1 - f)^1.7, and off after 0.7."""
    return 0.0 if f > PIVOT else rise * (1.0 - f) ** 1.7


def _pivot_adapter(f: float, warmup: float) -> float:
    """The adapter's half: exponentially from 1/6 to 1 while the rows settle, then a cosine to 0."""
    rise = warmup or ADAPTER_RISE
    return RISE_FROM ** (1.0 - f / rise) if f < rise else 0.5 * (1.0 + math.cos(math.pi * _left(f, rise)))
