"""How often levels are drawn, against densities integrated in the test and draws made as the papers make them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from trainer.args import LevelsArgs
from trainer.objectives.levels import draw_timesteps, shares, shift_of

DRAWS = 40_000
BINS = 20


def options(**given: Any) -> LevelsArgs:
    return LevelsArgs.model_validate(given)


def drawn(args: LevelsArgs, low: int = 0, high: int = 1000, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return draw_timesteps(DRAWS, low, high, torch.Generator().manual_seed(0), args, steps=1000, size=size)


def histogram(t: torch.Tensor) -> np.ndarray[Any, Any]:
    """Share of timesteps in each of BINS parts of 0..999."""
    return np.histogram(t.numpy(), bins=BINS, range=(0, 1000))[0] / len(t)


def integrated(density: Any) -> np.ndarray[Any, Any]:
    """The same of a density over 0..1, by the midpoint rule."""
    x = (np.arange(200_000) + 0.5) / 200_000
    mass = density(x).reshape(BINS, -1).sum(1)
    return mass / mass.sum()


def normal(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


DENSITIES: dict[str, tuple[dict[str, Any], Any]] = {
    "linear": ({"density": "linear"}, lambda x: 2 * x),
    "linear to clean": ({"density": "linear", "lean": -0.5}, lambda x: 1.5 - x),
    "cosine": ({"density": "cosine"}, lambda x: 1 - np.cos(np.pi * x)),
    "cosine to clean": ({"density": "cosine", "lean": -1}, lambda x: 1 + np.cos(np.pi * x)),
    "late": ({"density": "late"}, lambda x: x**2),
    "early": ({"density": "late", "power": 0.5}, lambda x: x**-0.5),
    "sigmoid": ({"density": "logit_normal"}, lambda x: normal(np.log(x / (1 - x))) / (x * (1 - x))),
    "logit_normal": (
        {"density": "logit_normal", "mean": -0.5, "std": 0.7},
        lambda x: normal((np.log(x / (1 - x)) + 0.5) / 0.7) / (x * (1 - x)),
    ),
    "shifted": ({"shift": 3}, lambda x: 3 / (3 - 2 * x) ** 2),
    "shifted sigmoid": (
        {"density": "logit_normal", "shift": 3},  # a shift adds its log to the logit
        lambda x: normal(np.log(x / (1 - x)) - math.log(3)) / (x * (1 - x)),
    ),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_have_their_density(name: str) -> None:
    given, density = DENSITIES[name]
    np.testing.assert_allclose(histogram(drawn(options(**given))), integrated(density), atol=0.006)


@pytest.mark.parametrize("scale", [1.29, 0.81, -1.0])
def test_mode_draws_as_diffusers_does(scale: float) -> None:
    level = compute_density_for_timestep_sampling(
        "mode", DRAWS, mode_scale=scale, generator=torch.Generator().manual_seed(1)
    )
    theirs = histogram((level * 1000).long())
    np.testing.assert_allclose(histogram(drawn(options(density="mode", scale=scale))), theirs, atol=0.008)


def test_mode_above_0_favours_the_middle() -> None:
    most, least = (histogram(drawn(options(density="mode", scale=s)))[BINS // 2] for s in (1.29, -1.0))
    assert most > 1.5 / BINS > 0.8 / BINS > least


def test_logit_normal_draws_as_diffusers_does() -> None:
    level = compute_density_for_timestep_sampling(
        "logit_normal", DRAWS, logit_mean=0.3, logit_std=0.8, generator=torch.Generator().manual_seed(1)
    )
    ours = drawn(options(density="logit_normal", mean=0.3, std=0.8))
    np.testing.assert_allclose(histogram(ours), histogram((level * 1000).long()), atol=0.008)


def test_a_shift_draws_what_the_shifted_scheduler_shows() -> None:
    shown = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.numpy()
    ours = np.sort(drawn(options(shift=3)).numpy() + 0.5) / 1000
    quantiles = np.linspace(0.02, 0.98, 49)
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(shown, quantiles), atol=0.01)


def test_the_window_cuts_the_density_and_changes_nothing_inside() -> None:
    args = options(density="logit_normal", shift=2)
    whole, part = shares(0, 1000, 1000, args, (1, 1)), shares(200, 700, 1000, args, (1, 1))
    torch.testing.assert_close(part, whole[200:700] / whole[200:700].sum())
    t = drawn(args, 200, 700)
    assert (t.min() >= 200, t.max() < 700, t.dtype) == (True, True, torch.int64)
    assert set(draw_timesteps(500, 3, 5, torch.Generator(), args, steps=1000).tolist()) == {3, 4}


def test_plain_draws_are_those_of_randint() -> None:
    expected = torch.randint(3, 900, (50,), generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw_timesteps(50, 3, 900, torch.Generator().manual_seed(7), options(), steps=1000), expected)


def test_a_density_that_leaves_nothing_in_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logit_normal draws nothing between t_min 0 and t_max 1;"):
        shares(0, 1, 1000, options(density="logit_normal", mean=5, std=0.1), (64, 64))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (128, 128), (96, 160)])
def test_shifts_by_size(size: tuple[int, int]) -> None:
    pixels = size[0] * 8 * size[1] * 8
    assert shift_of(options(shift_by="sd3"), size) == pytest.approx(math.sqrt(pixels / 256**2))
    assert shift_of(options(shift_by="sd3", shift_base=64), size) == pytest.approx(math.sqrt(pixels / 512**2))
    mu = calculate_shift(size[0] * size[1] // 4)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    level = torch.tensor(0.3)
    theirs = scheduler.time_shift(mu, 1.0, level)
    shift = shift_of(options(shift_by="flux"), size)
    torch.testing.assert_close(shift * level / (1 + (shift - 1) * level), theirs)


def test_a_larger_picture_is_trained_noisier() -> None:
    for by in ("sd3", "flux"):
        small, large = (drawn(options(shift_by=by), size=size).float().mean() for size in ((32, 32), (128, 128)))
        assert large > small + 100
