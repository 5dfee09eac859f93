"""Optimizers by name, learning rates as pure functions of progress, rules for single layers.

Each component (the adapter, the token rows) has an optimizer of its own. A parameter group holds what learns alike:
it has a "scale", the factor by which it learns faster than the component (LoRA+, rules), and a "rule", the pattern of
the rule that it obeys, or "". Progress f is finished updates / all updates, in 0..1. A rate is always set, never
multiplied.

    usual    rates of components that were given none
    table    names -> optimizers, and which settings each of them takes
    curves   progress -> factor of the rate
    rules    which parameter obeys which rule
    rates    the rates of a component's groups at each progress
    updates  one update, in which what has rate 0 does not move; averages put in for a while
    waiting  what optimizers remember, kept on another device between updates
    moved    whether everything that was trained has moved
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from trainer.args import ComponentOptim, OptimArgs, RuleArgs
from trainer.optim import curves, usual
from trainer.optim.rates import Rates, logged
from trainer.optim.rules import Components, assigned, cast, described
from trainer.optim.table import OPTIMIZERS, averages, check, make
from trainer.optim.updates import HasAverages, evaluated, step
from trainer.optim.waiting import wait

log = logging.getLogger(__name__)

__all__ = [
    "OPTIMIZERS",
    "HasAverages",
    "Rates",
    "assigned",
    "build",
    "check",
    "described",
    "evaluated",
    "filled",
    "logged",
    "prepare",
    "step",
]


def filled(args: OptimArgs, trained: Collection[str], widths: Mapping[str, int], pace: float) -> OptimArgs:
    """With a curve and a rate for each component that has none (`curves.filled`, `usual.filled`).

    Args:
        trained: names of the components of the run.
        widths, pace: as for `usual.filled`.
    """
    averaging = [name for name in trained if averages(getattr(args, name), f"optim.{name}")]
    return usual.filled(curves.filled(args, trained, averaging), widths, pace)


def prepare(
    args: OptimArgs, steps: int, components: Components, scales: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, Optimizer], dict[str, Rates]]:
    """Each component's optimizer and its rates.

    Args:
        steps: updates of the run.
        components: "adapter", "rows" -> their named parameters.
        scales: the same -> `build`'s.

    Raises:
        ValueError: rules, rates or optimizers do not fit what is trained.
    """
    rules = assigned(args.rules, components)
    cast(rules, components)
    for line in described(args.rules, rules):
        log.info("%s", line)
    optimizers: dict[str, Optimizer] = {}
    rates: dict[str, Rates] = {}
    for part, named in components.items():
        section, obeyed = getattr(args, part), rules[part]
        rates[part] = Rates(section, steps, component=part, rules=obeyed.values(), pivot=args.pivot)
        optimizers[part] = build(section, named, scales[part], obeyed, where=f"optim.{part}")
    wait(rules, components, optimizers)
    return optimizers, rates


def build(
    args: ComponentOptim,
    parameters: Iterable[tuple[str, nn.Parameter]],
    scales: Mapping[str, float] | None = None,
    rules: Mapping[str, RuleArgs] | None = None,
    *,
    where: str = "optim.adapter",
) -> Optimizer:
    """The optimizer of one component, with groups that know their parameters by name.

    Args:
        scales: by name, how many times as fast as the rest a parameter learns; 1 for those that are not named.
        rules: by name, the rule that a parameter obeys.
        where: the component's section, for messages.

    Raises:
        ValueError: there is nothing to train; no optimizer has this name, or it has no such setting; or it has one
            rate for all and `scales` or `rules` would need several.
    """
    groups: dict[tuple[float, str], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        rule = (rules or {}).get(name)
        scale = float((scales or {}).get(name, 1.0)) * (rule.lr_scale if rule else 1.0)
        groups.setdefault((scale, rule.match if rule else ""), []).append((name, parameter))
    if not groups:
        raise ValueError(f"{where}: {args.name} was given no parameters to train")
    made = [{"params": named, "scale": scale, "rule": rule} for (scale, rule), named in groups.items()]
    return make(args, made, list((rules or {}).values()), where=where)
