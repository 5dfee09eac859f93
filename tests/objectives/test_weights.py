"""Weights of noise levels against values worked out by hand, and one weighting against itself in every target."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from pydantic import ValidationError

from trainer.args import ObjectiveArgs, WeightArgs
from trainer.objectives.weights import OF_X0, check_weights, weight_of
from trainer.path import FlowPath, NoisePath, Target

SNR = (9.0, 1.0, 0.25)
DIFFUSION = torch.tensor([0.9, 0.5, 0.2])  # alphas_cumprod of those
FLOW = torch.tensor([0.25, 0.5, 2 / 3])  # sigmas of those: (1 - s) / s is 3, 1, 1/2


def path_of(target: Any) -> NoisePath:
    return FlowPath(FLOW) if target == "flow_prediction" else NoisePath(DIFFUSION, target)


def options(**given: float) -> WeightArgs:
    return WeightArgs.model_construct(**{**WeightArgs().model_dump(), **given})


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("min_snr", "epsilon", (5 / 9, 1, 1)),
        ("min_snr", "v_prediction", (5 / 10, 1 / 2, 0.25 / 1.25)),
        ("min_snr", "sample", (5, 1, 0.25)),
        ("min_snr", "flow_prediction", (5 / 16, 1 / 4, 0.25 * 4 / 9)),  # s^2 = 1/16, 1/4, 4/9
        ("soft_min_snr", "epsilon", (5 / 14, 5 / 6, 5 / 5.25)),
        ("soft_min_snr", "sample", (45 / 14, 5 / 6, 1.25 / 5.25)),
        ("debiased", "epsilon", (1 / 3, 1, 2)),
        ("debiased", "v_prediction", (3 / 10, 1 / 2, 0.5 / 1.25)),
        ("p2", "epsilon", (1 / 10, 1 / 2, 1 / 1.25)),
        ("p2", "v_prediction", (9 / 100, 1 / 4, 0.25 / 1.25**2)),
        ("edm", "sample", (13, 5, 4.25)),  # (sigma^2 + 1/4) / (sigma^2 / 4) at sigma^2 = 1/9, 1, 4
        ("edm", "epsilon", (13 / 9, 5, 17)),
        ("edm", "flow_prediction", (13 / 16, 5 / 4, 4.25 * 4 / 9)),
    ],
)
def test_weights_by_hand(kind: str, target: str, expected: tuple[float, ...]) -> None:
    weight = weight_of(path_of(target), torch.arange(3), kind, 5.0, options())
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float32))


def test_options_of_p2_and_edm_count() -> None:
    path, t = path_of("epsilon"), torch.tensor([0])
    assert weight_of(path, t, "p2", 0.0, options(p2_k=7.0, p2_gamma=0.5)).item() == pytest.approx(0.25)
    assert weight_of(path_of("sample"), t, "p2", 0.0, options(p2_k=7.0, p2_gamma=0.5)).item() == pytest.approx(9 / 4)
    assert weight_of(path, t, "edm", 0.0, options(sigma_data=1.0)).item() == pytest.approx(10 / 9)


@pytest.mark.parametrize("kind", OF_X0)
@pytest.mark.parametrize("target", get_args(Target))
def test_a_weighting_weighs_the_same_picture_whatever_the_model_predicts(kind: str, target: Any) -> None:
    """Of two predictions, the weighted squared distance is that of the pictures that they stand for."""
    path, t = path_of(target), torch.arange(3)
    xt, one, other = torch.randn(3, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    ours = ((one - other) ** 2).flatten(1).mean(1) * weight_of(path, t, kind, 5.0, options())
    x0 = ((path.x0_of(one, xt, t) - path.x0_of(other, xt, t)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(ours, x0 * weight_of(path_of("sample"), t, kind, 5.0, options()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_and_soft_min_snr_are_those_of_a_preconditioned_model(sigma_data: float) -> None:
    """k-diffusion's Denoiser: the network's error e is one of c_out e in x0; karras weighs e^2 by 1."""
    sigma, error = torch.tensor([0.03, 0.5, 4.0]), torch.tensor([0.3, -1.2, 0.7])
    path, t = NoisePath(1 / (1 + sigma**2), "sample"), torch.arange(3)
    total = sigma**2 + sigma_data**2
    in_x0 = (sigma * sigma_data / total.sqrt() * error) ** 2
    edm = weight_of(path, t, "edm", 0.0, options(sigma_data=sigma_data))
    torch.testing.assert_close(edm * in_x0, error**2, rtol=1e-4, atol=0)
    soft = weight_of(path, t, "soft_min_snr", sigma_data**-2, options())
    torch.testing.assert_close(soft * in_x0, (sigma * sigma_data) ** 2 / total**2 * error**2, rtol=1e-4, atol=0)


def test_min_snr_is_that_of_diffusers_scripts() -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.tensor([0, 100, 500, 999])
    snr = compute_snr(scheduler, t)
    clipped = snr.clamp(max=5.0)
    for target, over in (("epsilon", snr), ("v_prediction", snr + 1)):
        mine = weight_of(NoisePath.from_scheduler(scheduler, target), t, "min_snr", 5.0, options())
        torch.testing.assert_close(mine, clipped / over)


def test_the_end_of_a_zero_snr_path_stays_finite_or_is_refused() -> None:
    acp, last = torch.tensor([0.5, 0.0]), torch.tensor([1])
    at_end = {
        (kind, target): weight_of(NoisePath(acp, target), last, kind, 5.0, options()).item()
        for kind in OF_X0
        for target in ("epsilon", "v_prediction")
    }
    assert at_end["min_snr", "epsilon"] == at_end["soft_min_snr", "epsilon"] == at_end["p2", "epsilon"] == 1.0
    assert at_end["min_snr", "v_prediction"] == at_end["debiased", "v_prediction"] == 0.0
    assert at_end["edm", "v_prediction"] == 4.0
    for kind in ("debiased", "edm"):
        with pytest.raises(ValueError, match=r"timestep 1 .*pure noise.*epsilon.*t_max to 1"):
            check_weights(NoisePath(acp, "epsilon"), (0, 2), kind, 5.0, options())
        check_weights(NoisePath(acp, "epsilon"), (0, 1), kind, 5.0, options())


def test_a_weighting_that_changes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"edm with sigma_data 1.*v_prediction"):
        check_weights(path_of("v_prediction"), (0, 3), "edm", 0.0, options(sigma_data=1.0))
    check_weights(path_of("epsilon"), (0, 3), "edm", 0.0, options(sigma_data=1.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": {"kind": "soft_min_snr"}}, "needs objective.min_snr_gamma"),
        ({"weight": {"kind": "p2"}, "min_snr_gamma": 5}, "min_snr_gamma is given, but .*p2.*min_snr or soft_min_snr"),
        ({"weight": {"p2_k": 2}}, "p2_k is given, but kind is auto.*take p2"),
        ({"weight": {"kind": "p2", "sigma_data": 1}}, "sigma_data is given.*take edm"),
        ({"levels": {"lean": 0.5}}, "lean is given, but density is uniform.*take linear or cosine"),
        ({"levels": {"density": "mode", "mean": 1}}, "mean is given.*take logit_normal"),
        ({"levels": {"shift": 2, "shift_by": "flux"}}, "shift is given, but shift_by is flux.*take none"),
        ({"levels": {"shift_base": 64}}, "shift_base is given.*take sd3"),
        ({"distance": {"delta": 0.5}}, "delta is given, but kind is l2.*take huber or smooth_l1"),
        ({"distance": {"kind": "l1", "schedule": "snr"}}, "schedule is given"),
        ({"weight": {"kind": "min-snr"}}, "'auto', 'none', 'min_snr'"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ObjectiveArgs.model_validate(given)


def test_gamma_alone_is_min_snr() -> None:
    assert ObjectiveArgs().weighting == "none"
    assert ObjectiveArgs(min_snr_gamma=5).weighting == "min_snr"
    assert ObjectiveArgs.model_validate({"weight": {"kind": "soft_min_snr"}, "min_snr_gamma": 5}).weighting == (
        "soft_min_snr"
    )
