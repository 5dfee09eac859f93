"""Distances and their deltas against torch and values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.args import DistanceArgs
from trainer.objectives.distances import delta_of, distance
from trainer.path import FlowPath, NoisePath

PATH = NoisePath(torch.tensor([0.9, 0.5, 0.2, 0.0]), "v_prediction")  # sigma/alpha 1/3, 1, 2, endless
T = torch.arange(4)


def options(**given: Any) -> DistanceArgs:
    return DistanceArgs.model_validate(given)


def test_l1_and_l2_are_those_of_torch() -> None:
    pred, target = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    for kind, reference in (("l2", torch.nn.functional.mse_loss), ("l1", torch.nn.functional.l1_loss)):
        assert torch.equal(
            distance(pred, target, options(kind=kind), PATH, T), reference(pred, target, reduction="none")
        )


@pytest.mark.parametrize(
    ("kind", "error", "expected"),
    [
        ("huber", 0.4, 2 * 0.3 * 0.2),  # sqrt(0.16 + 0.09) is 0.5
        ("smooth_l1", 0.4, 2 * 0.2),
        ("huber", -0.4, 2 * 0.3 * 0.2),
        ("huber", 0.0, 0.0),
        ("huber", 0.003, 0.003**2),
        ("smooth_l1", 0.003, 0.003**2 / 0.3),
        ("huber", 3000.0, 2 * 0.3 * 2999.7),
        ("smooth_l1", 3000.0, 2 * 2999.7),
    ],
)
def test_huber_and_smooth_l1(kind: str, error: float, expected: float) -> None:
    pred = torch.full((4, 1, 1, 1), 1.0 + error)
    each = distance(pred, torch.ones_like(pred), options(kind=kind, delta=0.3), PATH, T)
    torch.testing.assert_close(each, torch.full_like(pred, expected), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", (0.16, 0.16, 0.16, 0.16)),
        ("exponential", (1.0, 0.4**0.5, 0.4, 0.4**1.5)),  # 0.16 to the powers 0, 1/4, 1/2, 3/4
        ("snr", (0.84 * 9 / 16 + 0.16, 0.84 / 4 + 0.16, 0.84 / 9 + 0.16, 0.16)),
    ],
)
def test_delta_of_each_level(schedule: str, expected: tuple[float, ...]) -> None:
    delta = delta_of(PATH, T, options(kind="huber", delta=0.16, schedule=schedule))
    torch.testing.assert_close(delta, torch.tensor(expected))


def test_a_flow_path_has_a_delta_by_snr() -> None:
    delta = delta_of(FlowPath(torch.tensor([0.25, 1.0])), torch.arange(2), options(kind="huber", schedule="snr"))
    torch.testing.assert_close(delta, torch.tensor([0.9 * 9 / 16 + 0.1, 0.1]))


def test_each_picture_has_the_delta_of_its_own_level() -> None:
    pred = torch.full((4, 1, 1, 2), 5.0)
    args = options(kind="huber", delta=0.16, schedule="exponential")
    each = distance(pred, torch.zeros_like(pred), args, PATH, T)
    for i, delta in enumerate(delta_of(PATH, T, args).tolist()):
        assert each[i, 0, 0, 1].item() == pytest.approx(2 * delta * ((25 + delta**2) ** 0.5 - delta))
