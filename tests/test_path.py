"""path.py against the diffusers schedulers, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from trainer.path import FlowPath, NoisePath

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TIMES = torch.tensor([0, 1, 250, 500, 998, 999])
SCHEDULERS: dict[str, Any] = {
    "ddpm": lambda: DDPMScheduler(**SD),
    "ddim": lambda: DDIMScheduler(**SD, clip_sample=False),
    "linear": lambda: DDPMScheduler(beta_schedule="linear"),
    "cosine": lambda: DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "ddpm_zero_snr": lambda: DDPMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "zero_snr": lambda: DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(TIMES), 4, 5, 6)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noisy_and_velocity_are_those_of_the_scheduler(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    path = NoisePath.from_scheduler(scheduler, "v_prediction")
    x0, eps = pictures()
    assert torch.equal(path.noisy(x0, eps, TIMES), scheduler.add_noise(x0, eps, TIMES))
    assert torch.equal(path.target_of(x0, eps, TIMES), scheduler.get_velocity(x0, eps, TIMES))


def test_the_target_of_an_eps_path_is_the_noise() -> None:
    x0, eps = pictures()
    assert torch.equal(NoisePath.from_scheduler(DDPMScheduler(**SD)).target_of(x0, eps, TIMES), eps)


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_x0_is_what_the_scheduler_reads_off_a_prediction(target: str) -> None:
    scheduler = DDIMScheduler(**SD, clip_sample=False, prediction_type=target)
    scheduler.set_timesteps(1000)
    path = NoisePath.from_scheduler(scheduler)
    xt, pred = pictures()
    for i, t in enumerate(TIMES.tolist()):
        expected = scheduler.step(pred[i : i + 1], t, xt[i : i + 1]).pred_original_sample
        torch.testing.assert_close(path.x0_of(pred[i : i + 1], xt[i : i + 1], TIMES[i : i + 1]), expected)


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_gives_x0_back(target: str) -> None:
    path = NoisePath.from_scheduler(DDPMScheduler(**SD), target)
    x0, eps = pictures()
    back = path.x0_of(path.target_of(x0, eps, TIMES), path.noisy(x0, eps, TIMES), TIMES)
    torch.testing.assert_close(back, x0, atol=1e-4, rtol=1e-4)


def test_alpha_sigma_and_snr() -> None:
    path = NoisePath(torch.tensor([0.9, 0.5, 0.2]), "epsilon")
    t = torch.tensor([2, 0])
    torch.testing.assert_close(path.alpha(t), torch.tensor([0.2**0.5, 0.9**0.5]))
    torch.testing.assert_close(path.sigma(t), torch.tensor([0.8**0.5, 0.1**0.5]))
    torch.testing.assert_close(path.snr(t), torch.tensor([0.25, 9.0]))
    assert path.steps == 3


def test_snr_is_zero_at_the_end_of_a_zero_snr_path() -> None:
    path = NoisePath.from_scheduler(SCHEDULERS["zero_snr"]())
    assert path.target == "v_prediction"
    assert path.snr(torch.tensor([999])).item() == 0.0


def test_results_follow_the_dtype_of_the_pictures() -> None:
    path = NoisePath.from_scheduler(DDPMScheduler(**SD), "v_prediction")
    x0, eps = (part.to(torch.bfloat16) for part in pictures())
    assert path.noisy(x0, eps, TIMES).dtype == path.target_of(x0, eps, TIMES).dtype == torch.bfloat16


@pytest.mark.parametrize("prediction", ["flow_prediction", "score"])
def test_a_target_that_is_not_supported_is_refused_by_name(prediction: str) -> None:
    with pytest.raises(ValueError, match=f"{prediction}.*epsilon, v_prediction, sample"):
        NoisePath(torch.tensor([0.9]), prediction)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'epsilon' is not supported; it is one of flow_prediction"):
        NoisePath.from_scheduler(FlowMatchEulerDiscreteScheduler(), "epsilon")


FLOWS: dict[str, Any] = {
    "plain": lambda: FlowMatchEulerDiscreteScheduler(),
    "sd3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flux": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_path_is_that_of_the_scheduler(name: str) -> None:
    scheduler = FLOWS[name]()
    path, levels = NoisePath.from_scheduler(scheduler), torch.arange(1000)
    assert torch.equal(path.sigma(levels), scheduler.sigmas.flip(0))
    torch.testing.assert_close(path.time(levels), scheduler.timesteps.flip(0), rtol=1e-6, atol=0)
    x0, eps = pictures()
    at = path.sigma(TIMES) * 1000  # which the scheduler looks up among its timesteps
    assert torch.equal(path.noisy(x0, eps, TIMES), scheduler.scale_noise(x0, at, eps))
    assert torch.equal(path.alpha(TIMES) + path.sigma(TIMES), torch.ones(len(TIMES)))


def test_a_flow_step_along_the_target_ends_where_the_schedulers_does() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    path, level = NoisePath.from_scheduler(scheduler), torch.tensor([999])
    x0, eps = (part[:1] for part in pictures())
    scheduler.set_timesteps(1)  # from noise to the picture at once
    v = path.target_of(x0, eps, level)
    torch.testing.assert_close(scheduler.step(v, scheduler.timesteps[0], eps).prev_sample, x0, rtol=0, atol=1e-5)
    assert torch.equal(v, eps - x0)
    assert NoisePath.from_scheduler(scheduler).steps == 1000  # whatever it was set to draw with


def test_a_flow_path_tells_x0_and_snr() -> None:
    path = FlowPath.shifted(1000)
    x0, eps = pictures()
    back = path.x0_of(path.target_of(x0, eps, TIMES), path.noisy(x0, eps, TIMES), TIMES)
    torch.testing.assert_close(back, x0, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(path.snr(torch.tensor([249, 499, 999])), torch.tensor([9.0, 1.0, 0.0]))
    assert torch.equal(NoisePath.from_scheduler(DDPMScheduler(**SD)).time(TIMES), TIMES)
    few = FlowMatchEulerDiscreteScheduler(num_train_timesteps=4)
    told = NoisePath.from_scheduler(few).time(torch.arange(4))
    torch.testing.assert_close(told, few.timesteps.flip(0), rtol=1e-6, atol=0)  # of its own number of steps


def test_sigmas_that_are_no_flow_path_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 1"):
        FlowPath(torch.tensor([0.5, 1.1]))


def test_numbers_that_are_no_path_are_refused() -> None:
    with pytest.raises(ValueError, match="below 1"):
        NoisePath(torch.tensor([1.0, 0.5]), "epsilon")
