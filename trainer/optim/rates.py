"""The rates of one component's groups, each a pure function of progress: the component's curve, or a rule's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch.optim import Optimizer

from trainer import registry
from trainer.args import ComponentOptim, CurveArgs, RuleArgs
from trainer.optim.curves import factor, off

Curve = Callable[[float], float]


class Rates:
    """`rates(progress)` is the component's rate; `hold` and `put` make it act on the groups of its optimizer.

    Args:
        steps: updates of the run, which a warm-up given in updates is a part of.
        component: its name; the pivots treat "rows" in another way than the rest.
        rules: those that some of its parameters obey.
        pivot: progress at which curves named hard_pivot change over.

    Raises:
        ValueError: a warm-up is longer than the run, a curve is not there, or a rule freezes its tensors all along.
    """

    def __init__(
        self,
        args: ComponentOptim,
        steps: int,
        *,
        component: str = "adapter",
        rules: Iterable[RuleArgs] = (),
        pivot: float = 0.5,
    ) -> None:
        self._args, self._component, self._pivot, self._steps = args, component, pivot, steps
        self._peak = args.peak
        self._rules: dict[str, RuleArgs | None] = {"": None, **{rule.match: rule for rule in rules}}
        self._curve = _curve(args, f"optim.{component}", component, steps, pivot)
        self._own: dict[str, Curve] = {}
        for match, rule in self._rules.items():
            if rule is None:
                continue
            if rule.curve:
                updates = steps * (rule.until - rule.after)
                self._own[match] = _curve(rule, f"optim.rules {match!r}", component, updates, pivot)
            if not self.updates(match, steps):
                raise ValueError(
                    f"optim.rules: {match!r} freezes its tensors in all {steps} updates, so they would be trained for "
                    "nothing; widen after and until, or leave those layers out of the adapter"
                )

    def __call__(self, progress: float) -> float:
        """The learning rate of what obeys no rule and has scale 1."""
        return self._peak * self._curve(progress)

    def frozen(self, rule: str, progress: float) -> bool:
        """Whether what obeys this rule ("": none) must not move: outside its time, or beyond a hard pivot."""
        obeyed = self._rules[rule]
        if obeyed is not None and not obeyed.after <= progress < obeyed.until:
            return True
        return rule not in self._own and off(self._args, self._component, progress, self._pivot)

    def of(self, rule: str, progress: float, lr: float | None = None) -> float:
        """The rate of what obeys this rule and has scale 1; `lr` stands for the component's rate where that changed."""
        if self.frozen(rule, progress):
            return 0.0
        obeyed = self._rules[rule]
        if obeyed is not None and rule in self._own:
            return self._peak * self._own[rule]((progress - obeyed.after) / (obeyed.until - obeyed.after))
        return self(progress) if lr is None else lr

    def hold(self, optimizer: Optimizer, progress: float) -> None:
        """Drops the gradients of what is frozen, so that they count in no norm and are remembered by no moment."""
        for group in optimizer.param_groups:
            if self.frozen(group["rule"], progress):
                for parameter in group["params"]:
                    parameter.grad = None

    def put(self, optimizer: Optimizer, progress: float, lr: float | None = None) -> None:
        """Puts the rates of `progress` in force; `lr` as in `of`."""
        for group in optimizer.param_groups:
            group["lr"] = self.of(group["rule"], progress, lr) * group["scale"]

    def updates(self, rule: str, done: int) -> int:
        """How many of the run's first `done` updates could move what obeys this rule."""
        return sum(self.of(rule, update / self._steps) > 0.0 for update in range(done))


def logged(component: str, optimizer: Optimizer) -> dict[str, float]:
    """The step sizes in force: lr, and for Prodigy and its kind d * lr, d being the rate that it found.

    A component's, at scale 1, is under its name; those of rules are under "component/pattern".
    """
    finds = "d0" in inspect.signature(type(optimizer).__init__).parameters
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        key = f"{component}/{group['rule']}" if group["rule"] else component
        scale = 1.0 if group["rule"] else float(group["scale"])
        rates.setdefault(key, float(group["lr"]) / scale * (float(group["d"]) if finds else 1.0))
    return {component: max(rates.values()), **rates}


def _curve(args: CurveArgs, where: str, component: str, steps: float, pivot: float) -> Curve:
    if ":" in args.curve:
        made: Any = registry.load({}, args.curve, f"{where}.curve")(round(steps))
        if not callable(made):
            raise registry.PartError(f"{where}.curve {args.curve!r} gave a {type(made).__name__}, nothing to call")
        return cast(Curve, made)
    warmup = args.warmup / steps if args.warmup >= 1 else args.warmup
    if warmup > 0.9:
        raise ValueError(
            f"{where}.warmup is {args.warmup:g} updates of {steps:g}, which leaves nothing to train at the full rate; "
            "give at most nine tenths of them"
        )
    return lambda progress: factor(args, component, progress, warmup, pivot)
