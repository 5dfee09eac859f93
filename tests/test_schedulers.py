"""Schedulers by name: a model that knows the picture ends at it along the base's path; what cannot work is named."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.schedulers import SCHEDULERS, SchedulerError, build, known

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"}
LEVELS = np.arange(1000)
BASES: dict[str, Any] = {
    "ddim": lambda: diffusers.DDIMScheduler(**BETAS, **DDIM),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    "zero snr": lambda: diffusers.DDIMScheduler(**BETAS, **DDIM, rescale_betas_zero_snr=True),
}


CASES = (("euler", "epsilon"), ("ddim", "v_prediction"), ("zero snr", "v_prediction"), ("ddim", "sample"))


def end(scheduler: Any, target: str, x0: Tensor) -> Tensor:
    """Where sampling ends with a model that knows x0, in 12 steps."""
    generator = [torch.Generator().manual_seed(0)]
    scheduler.set_timesteps(12)
    alphas = scheduler.alphas_cumprod.double().sqrt().numpy()
    drawn: dict[str, Any] = (
        {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    )
    x = torch.randn(x0.shape, generator=generator[0]) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        xt = scheduler.scale_model_input(x, t)
        alpha = float(np.interp(float(t), LEVELS, alphas))  # Karras' levels lie between those of training
        sigma = max((1 - alpha**2) ** 0.5, 1e-8)
        eps = (xt - alpha * x0) / sigma
        pred = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[target]
        x = scheduler.step(pred, t, x, **drawn).prev_sample
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_model_that_knows_the_picture_ends_at_it(name: str) -> None:
    x0 = 3 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))  # latents leave -1..1
    ends = 0
    for base, target in (
        ("euler", "epsilon"),
        ("ddim", "v_prediction"),
        ("zero snr", "v_prediction"),
        ("ddim", "sample"),
    ):
        try:
            scheduler = build(BASES[base](), target, name)
        except SchedulerError:  # what is said is tested below
            continue
        assert type(scheduler).__name__ == SCHEDULERS[name].kind
        assert scheduler.config.prediction_type == target
        assert abs(end(scheduler, target, x0) - x0).max() < 0.25
        ends += 1
    assert ends >= 2


def test_betas_spacing_and_zero_snr_stay_the_bases() -> None:
    own = BASES["zero snr"]()
    euler = build(own, "v_prediction", "euler")
    assert euler.config.timestep_spacing == "trailing"
    assert euler.alphas_cumprod[-1] < 1e-6
    torch.testing.assert_close(euler.alphas_cumprod[:-1], own.alphas_cumprod[:-1])
    with pytest.raises(SchedulerError, match=r"scheduler pndm cannot begin; take ddim, ddpm, euler"):
        build(own, "v_prediction", "pndm")
    with pytest.raises(SchedulerError, match=r"predicts pictures \(sample\)"):
        build(own, "sample", "euler_a")


def test_karras_levels_are_on_where_they_are_asked_for() -> None:
    own = diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    assert build(own, "epsilon").config.use_karras_sigmas is True
    assert build(own, "epsilon", "heun").config.use_karras_sigmas is False
    assert build(own, "epsilon", "heun_karras").config.use_karras_sigmas is True
    assert build(own, "epsilon", "dpm++_2m_sde_karras").config.algorithm_type == "sde-dpmsolver++"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("DPM++ 2M Karras", "dpm++_2m_karras"),
        ("dpm++-2m", "dpm++_2m"),
        ("Euler a", "euler_a"),
        ("euler-ancestral", "euler_a"),
        ("PLMS", "pndm"),
        ("dpmpp_2m_sde_karras", "dpm++_2m_sde_karras"),
    ],
)
def test_names_are_read_as_people_spell_them(said: str, name: str) -> None:
    assert known(said) == name


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(SchedulerError, match=r"'eular' is unknown; did you mean euler\? \(allowed: ddim, ddpm"):
        known("eular")
