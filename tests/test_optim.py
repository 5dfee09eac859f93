"""Optimizers: each setting is read back where it acts. Curves: pinned at values worked out by hand."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from prodigyopt import Prodigy
from torch import nn

from trainer.args import ComponentOptim
from trainer.optim import OPTIMIZERS, build, effective_lr, lr_at, set_lr


def args(**options: Any) -> ComponentOptim:
    return ComponentOptim.model_validate(options)


def parameter(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value, -2 * value]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_arrives(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    p = parameter()
    options = {"name": name, "lr": 0.5, "weight_decay": 0.25, "betas": (0.8, 0.95)}
    optimizer = build(args(**options), [("down", p)])
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.5
    assert group["weight_decay"] == 0.25
    assert tuple(group["betas"]) == (0.8, 0.95)
    assert group["eps"] == 1e-8
    assert group["params"] == [p]
    assert group["param_names"] == ["down"]
    assert capsys.readouterr().out == ""


def test_the_names_of_the_args_are_those_of_the_table() -> None:
    assert set(OPTIMIZERS) == set(ComponentOptim.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]


def test_adamw_takes_the_textbook_step_with_decoupled_decay() -> None:
    p = parameter()
    optimizer = build(args(lr=0.1, weight_decay=0.5), [("p", p)])
    p.grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    # the first Adam step is lr * sign(g); decay takes lr * wd * p
    torch.testing.assert_close(p.data, torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]))


def test_prodigy_is_the_published_one_with_bias_correction_and_safeguard() -> None:
    ours, theirs = parameter(), parameter()
    a = build(args(name="prodigy", lr=1.0, weight_decay=0.1), [("p", ours)])
    b = Prodigy([theirs], lr=1.0, betas=(0.9, 0.99), weight_decay=0.1, use_bias_correction=True, safeguard_warmup=True)
    for _ in range(30):
        for p, optimizer in ((ours, a), (theirs, b)):
            p.grad = p.detach() - 5.0
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert effective_lr(a) == a.param_groups[0]["d"] > 1e-6
    set_lr(a, 0.5)
    assert effective_lr(a) == 0.5 * a.param_groups[0]["d"]


def test_a_scale_multiplies_the_rate_of_its_own_parameters() -> None:
    """LoRA+ (arXiv 2402.12354): B learns 16 times as fast as A; the first step of Adam is lr * sign(g)."""
    a, b, c = parameter(), parameter(), parameter()
    optimizer = build(args(lr=0.1), [("a", a), ("b", b), ("c", c)], {"b": 16.0})
    assert [(group["param_names"], group["scale"]) for group in optimizer.param_groups] == [
        (["a", "c"], 1.0),
        (["b"], 16.0),
    ]
    set_lr(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.16]
    assert effective_lr(optimizer) == 0.01
    for p in (a, b, c):
        p.grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    for p, lr in ((a, 0.01), (b, 0.16), (c, 0.01)):
        torch.testing.assert_close(p.data, torch.tensor([1.0 - lr, -2.0 + lr]))


def test_prodigy_refuses_several_rates() -> None:
    with pytest.raises(ValueError, match="should learn 1, 16 times as fast as one another"):
        build(args(name="prodigy", lr=1.0), [("a", parameter()), ("b", parameter())], {"b": 16.0})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_moves_at_rate_zero(name: str) -> None:
    p = parameter()
    optimizer = build(args(name=name, lr=1.0, weight_decay=0.5), [("p", p)])
    for rate, moves in ((0.0, False), (1.0, True), (0.0, False)):
        set_lr(optimizer, rate)
        before = p.detach().clone()
        p.grad = torch.tensor([3.0, -4.0])
        optimizer.step()
        assert (not torch.equal(p, before)) == moves


def test_prodigy_with_the_rate_of_another_optimizer_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(args(name="prodigy", lr=1e-4), [("p", parameter())])
    assert "give 1" in caplog.text


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        build(args(), [])


@pytest.mark.parametrize(
    ("curve", "warmup", "points"),
    [
        ("constant", 0.0, {0.0: 2.0, 0.5: 2.0, 1.0: 2.0}),
        ("constant", 0.5, {0.0: 0.0, 0.25: 1.0, 0.5: 2.0, 1.0: 2.0}),
        ("linear", 0.0, {0.0: 2.0, 0.25: 1.5, 1.0: 0.0}),
        ("linear", 0.2, {0.0: 0.0, 0.1: 1.0, 0.2: 2.0, 0.6: 1.0, 1.0: 0.0}),
        ("cosine", 0.0, {0.0: 2.0, 1 / 3: 1.5, 0.5: 1.0, 2 / 3: 0.5, 1.0: 0.0}),
        ("cosine", 0.5, {0.25: 1.0, 0.5: 2.0, 0.75: 1.0, 1.0: 0.0}),
        ("pivot_rows", 0.0, {0.0: 2.0, 0.5: 2.0 * 0.5**1.7, 0.7: 2.0 * 0.3**1.7, 0.701: 0.0, 1.0: 0.0}),
        ("pivot_rows", 0.5, {0.0: 0.0, 0.25: 0.75**1.7, 0.5: 2.0 * 0.5**1.7, 0.9: 0.0}),
        ("pivot_adapter", 0.0, {0.0: 1 / 3, 0.15: 2.0 / 6**0.5, 0.3: 2.0, 0.65: 1.0, 1.0: 0.0}),
        ("pivot_adapter", 0.5, {0.0: 1 / 3, 0.25: 2.0 / 6**0.5, 0.5: 2.0, 0.75: 1.0, 1.0: 0.0}),
    ],
)
def test_curves(curve: str, warmup: float, points: dict[float, float]) -> None:
    for progress, rate in points.items():
        at = lr_at(args(lr=2.0, curve=curve, warmup=warmup), progress)
        assert at == pytest.approx(rate, abs=1e-12), f"{curve} at {progress}"
