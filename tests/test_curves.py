"""Curves against closed forms, torch's and transformers' schedulers; the pivots; a curve of a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch.optim import SGD, lr_scheduler

from trainer.args import ComponentOptim, OptimArgs
from trainer.optim import Rates, filled
from trainer.optim.usual import WIDTHS
from trainer.registry import PartError

STEPS = 40


def rates(steps: int = STEPS, component: str = "adapter", pivot: float = 0.5, **options: Any) -> Rates:
    return Rates(ComponentOptim.model_validate({"lr": 2.0, **options}), steps, component=component, pivot=pivot)


@pytest.mark.parametrize(
    ("curve", "options", "points"),
    [
        ("constant", {}, {0.0: 2.0, 0.5: 2.0, 1.0: 2.0}),
        ("constant", {"warmup": 0.5}, {0.0: 0.0, 0.25: 1.0, 0.5: 2.0, 1.0: 2.0}),
        ("constant", {"warmup": 0.5, "ramp": "exponential"}, {0.0: 1 / 3, 0.25: 2 / 6**0.5, 0.5: 2.0, 1.0: 2.0}),
        ("linear", {}, {0.0: 2.0, 0.25: 1.5, 1.0: 0.0}),
        ("linear", {"warmup": 0.2}, {0.0: 0.0, 0.1: 1.0, 0.2: 2.0, 0.6: 1.0, 1.0: 0.0}),
        ("linear", {"warmup": 8}, {0.0: 0.0, 0.1: 1.0, 0.2: 2.0, 0.6: 1.0, 1.0: 0.0}),
        ("linear", {"floor": 0.5}, {0.0: 2.0, 0.5: 1.5, 1.0: 1.0}),
        ("cosine", {}, {0.0: 2.0, 1 / 3: 1.5, 0.5: 1.0, 2 / 3: 0.5, 1.0: 0.0}),
        ("cosine", {"warmup": 0.5}, {0.25: 1.0, 0.5: 2.0, 0.75: 1.0, 1.0: 0.0}),
        ("restarts", {"cycles": 2}, {0.0: 2.0, 0.25: 1.0, 0.5: 2.0, 0.75: 1.0, 1.0: 0.0}),
        ("polynomial", {"power": 2}, {0.0: 2.0, 0.5: 0.5, 0.75: 0.125, 1.0: 0.0}),
        ("exponential", {"floor": 0.01}, {0.0: 2.0, 0.5: 0.2, 1.0: 0.02}),
        ("rex", {}, {0.0: 2.0, 0.5: 2 * 2 / 3, 1.0: 0.0}),
        ("pivot_rows", {}, {0.0: 2.0, 0.5: 2.0 * 0.5**1.7, 0.7: 2.0 * 0.3**1.7, 0.701: 0.0, 1.0: 0.0}),
        ("pivot_rows", {"warmup": 0.5}, {0.0: 0.0, 0.25: 0.75**1.7, 0.5: 2.0 * 0.5**1.7, 0.9: 0.0}),
        ("pivot_adapter", {}, {0.0: 1 / 3, 0.15: 2.0 / 6**0.5, 0.3: 2.0, 0.65: 1.0, 1.0: 0.0}),
        ("pivot_adapter", {"warmup": 0.5}, {0.0: 1 / 3, 0.25: 2.0 / 6**0.5, 0.5: 2.0, 0.75: 1.0, 1.0: 0.0}),
    ],
)
def test_curves(curve: str, options: dict[str, Any], points: dict[float, float]) -> None:
    at = rates(curve=curve, **options)
    for progress, rate in points.items():
        assert at(progress) == pytest.approx(rate, abs=1e-12), f"{curve} at {progress}"


def poly(optimizer: SGD) -> Any:
    return lr_scheduler.PolynomialLR(optimizer, total_iters=STEPS, power=3)


SCHEDULERS: dict[str, tuple[dict[str, Any], Callable[[SGD], Any]]] = {
    "linear": (
        {"curve": "linear", "warmup": 5},
        lambda o: transformers.get_linear_schedule_with_warmup(o, 5, STEPS),
    ),
    "cosine": (
        {"curve": "cosine", "warmup": 5},
        lambda o: transformers.get_cosine_schedule_with_warmup(o, 5, STEPS),
    ),
    "restarts": (
        {"curve": "restarts", "warmup": 5, "cycles": 3},
        lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, 5, STEPS, 3),
    ),
    "constant": (
        {"curve": "constant", "warmup": 5},
        lambda o: transformers.get_constant_schedule_with_warmup(o, 5),
    ),
    "polynomial": ({"curve": "polynomial", "power": 3}, poly),
    "floor": (
        {"curve": "cosine", "floor": 0.1},
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.2),
    ),
    "exponential": (
        {"curve": "exponential", "floor": 0.01},
        lambda o: lr_scheduler.ExponentialLR(o, gamma=0.01 ** (1 / STEPS)),
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_they_are_the_schedulers_of_torch_and_transformers(name: str) -> None:
    options, make = SCHEDULERS[name]
    ours, optimizer = rates(**options), SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = make(optimizer)
    for update in range(STEPS):
        assert ours(update / STEPS) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), update
        optimizer.step()
        theirs.step()


def test_adaptive_is_each_components_half_of_the_pivot() -> None:
    for component, half in (("rows", "pivot_rows"), ("adapter", "pivot_adapter")):
        both, one = rates(component=component, curve="adaptive"), rates(component=component, curve=half)
        assert [both(f / 50) for f in range(51)] == [one(f / 50) for f in range(51)]


def test_a_hard_pivot_trains_one_and_then_the_other() -> None:
    rows, adapter = (rates(component=name, curve="hard_pivot", pivot=0.25) for name in ("rows", "adapter"))
    for update in range(STEPS):
        f = update / STEPS
        assert (rows(f), adapter(f)) == ((2.0, 0.0) if f < 0.25 else (0.0, 2.0))
        assert (rows.frozen("", f), adapter.frozen("", f)) == ((False, True) if f < 0.25 else (True, False))
    slow = rates(curve="hard_pivot", pivot=0.25, warmup=0.5)
    assert [slow(f) for f in (0.2, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"curve": "cosin"}, r"curve 'cosin' is unknown; did you mean cosine\?"),
        ({"curve": "constant", "floor": 0.1}, "floor would do nothing for curve constant"),
        ({"curve": "linear", "cycles": 2}, "cycles would do nothing for curve linear"),
        ({"curve": "cosine", "power": 2}, "power would do nothing"),
        ({"curve": "cosine", "ramp": "exponential"}, "ramp would do nothing"),
        ({"curve": "exponential"}, "give floor"),
        ({"curve": "linear", "warmup": 2.5}, "whole updates, or a share"),
        ({"curve": "linear", "warmup": 0.95}, "whole updates, or a share"),
        ({"curve": "a.py:b", "warmup": 5}, "warmup would do nothing"),
        ({"floor": 0.1}, "floor is given, but not the curve that it is for"),
    ],
)
def test_what_a_curve_has_not_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        rates(**options)


PAIR = ("rows", "adapter")


@pytest.mark.parametrize(
    ("trained", "given", "curves"),
    [
        (PAIR, {}, ["adaptive", "adaptive"]),
        ((*PAIR, "text"), {}, ["adaptive", "adaptive", "adaptive"]),
        (("adapter",), {}, ["constant"]),
        (("adapter", "text"), {}, ["constant", "constant"]),
        (("rows",), {}, ["constant"]),
        (PAIR, {"adapter": "hard_pivot"}, ["hard_pivot", "hard_pivot"]),
        (PAIR, {"rows": "pivot_rows"}, ["pivot_rows", "adaptive"]),
        (PAIR, {"adapter": "cosine"}, ["constant", "cosine"]),
        ((*PAIR, "text"), {"text": "linear"}, ["adaptive", "adaptive", "linear"]),
    ],
)
def test_rows_and_an_adapter_pivot_where_nobody_says_otherwise(
    trained: tuple[str, ...], given: dict[str, str], curves: list[str]
) -> None:
    args = OptimArgs.model_validate({name: {"curve": curve} for name, curve in given.items()})
    done = filled(args, trained, WIDTHS, 1.0)
    assert [getattr(done, name).curve for name in trained] == curves
    assert filled(done, trained, WIDTHS, 1.0) == done
    assert OptimArgs.model_validate(done.model_dump()) == done
    assert filled(done, ("adapter",), WIDTHS, 1.0) == done, "what a run began with stays"


def test_what_averages_has_no_falling_curve_by_default() -> None:
    args = OptimArgs.model_validate({"adapter": {"name": "schedulefree-adamw"}})
    done = filled(args, PAIR, WIDTHS, 1.0)
    assert (done.rows.curve, done.adapter.curve) == ("adaptive", "constant")


def test_adaptive_is_its_two_halves() -> None:
    for component, half in (("rows", "pivot_rows"), ("adapter", "pivot_adapter"), ("text", "pivot_adapter")):
        one, two = (rates(component=component, curve=curve, warmup=0.1) for curve in ("adaptive", half))
        assert [one(f / STEPS) for f in range(STEPS)] == [two(f / STEPS) for f in range(STEPS)]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup is 39 updates of 40"):
        rates(curve="linear", warmup=39)


def test_a_curve_of_a_file_is_a_function_of_progress(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "def get_scheduler(steps):\n    return lambda progress: progress * steps\n\n\ndef no(steps):\n    return 3\n"
    )
    at = rates(curve=f"{file}:get_scheduler")
    assert [at(f) for f in (0.0, 0.25, 1.0)] == [0.0, 20.0, 80.0]
    with pytest.raises(PartError, match="gave a int, nothing to call"):
        rates(curve=f"{file}:no")
    assert math.isfinite(at(0.5))
