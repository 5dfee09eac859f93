"""What is drawn, by its moments and spectrum against references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.objectives.noise import draw_noise, gamma_shape, noisy_condition, perturbed
from trainer.types import Cond

LIKE = torch.zeros(64, 4, 16, 24)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pyramid_noise_has_unit_std_in_each_picture() -> None:
    eps = draw_noise(LIKE, seeded(), pyramid=0.8)
    torch.testing.assert_close(eps.flatten(1).std(1), torch.ones(64))
    assert not torch.equal(draw_noise(LIKE, seeded(), pyramid=0.1), draw_noise(LIKE, seeded()))


def power(eps: Tensor) -> tuple[float, float]:
    """Mean power at the lowest and at the highest frequencies of rows."""
    spectrum = torch.fft.rfft(eps, dim=-1, norm="ortho").abs() ** 2
    return spectrum[..., :2].mean().item(), spectrum[..., -3:].mean().item()


def test_pyramid_noise_moves_power_to_low_frequencies_by_its_discount() -> None:
    ratios = [low / high for low, high in (power(draw_noise(LIKE, seeded(), pyramid=p)) for p in (0.0, 0.3, 0.8))]
    assert 0.9 < ratios[0] < 1.1 < ratios[1] < 2 * ratios[1] < ratios[2]


def test_pyramid_noise_is_its_levels_by_hand() -> None:
    generator, like = seeded(3), torch.zeros(2, 1, 4, 6)
    eps = torch.randn(like.shape, generator=generator)
    for k, side in ((1, (2, 3)), (2, (1, 1))):
        coarse = torch.randn(2, 1, *side, generator=generator)
        eps = eps + 0.5**k * torch.nn.Upsample(size=(4, 6), mode="bilinear")(coarse)
    by_hand = torch.stack([picture / picture.std() for picture in eps])
    torch.testing.assert_close(draw_noise(like, seeded(3), pyramid=0.5), by_hand)


@pytest.mark.parametrize(("snr", "theta"), [(4.0, 0.5), (0.25, 0.5), (0.25, 2.0)])
def test_gamma_noise_has_the_moments_of_its_distribution(snr: float, theta: float) -> None:
    k = gamma_shape(torch.full((64,), snr), theta)
    assert k[0].item() == pytest.approx(1 / (snr * theta**2))  # (1 - ac) / (ac theta^2), as snr is ac / (1 - ac)
    eps = draw_noise(LIKE, seeded(), shape=k)
    assert eps.mean().item() == pytest.approx(0, abs=0.01)
    assert eps.std().item() == pytest.approx(1, rel=0.02)
    assert (eps**3).mean().item() == pytest.approx(2 / k[0].item() ** 0.5, rel=0.06)  # skewness
    assert eps.min().item() >= -(k[0].item() ** 0.5) - 1e-5


def test_gamma_noise_is_normal_where_it_ends() -> None:
    eps = draw_noise(LIKE, seeded(), shape=gamma_shape(torch.zeros(64), 0.001))
    assert eps.isfinite().all()
    assert (eps**3).mean().abs().item() < 0.03
    assert (eps**4).mean().item() == pytest.approx(3, rel=0.03)


def test_each_picture_has_the_gamma_of_its_own_level() -> None:
    eps = draw_noise(torch.zeros(2, 4, 64, 64), seeded(), shape=gamma_shape(torch.tensor([4.0, 1e-6]), 1.0))
    skew = (eps**3).flatten(1).mean(1)
    assert skew[0] > 3
    assert abs(skew[1]) < 0.1


def test_input_perturbation_adds_noise_of_its_own() -> None:
    eps = draw_noise(LIKE, seeded())
    added = perturbed(eps, 0.1, seeded(1)) - eps
    assert added.std().item() == pytest.approx(0.1, rel=0.01)
    assert abs((added * eps).mean().item()) < 0.002
    assert perturbed(eps, 0.0, seeded(1)) is eps


def test_condition_noise_is_in_the_std_of_each_picture() -> None:
    scale = torch.tensor([1.0, 10.0])
    cond = Cond(torch.randn(2, 77, 64, generator=seeded()) * scale[:, None, None] + 3.0, torch.full((2, 8), 2.0))
    sizes = torch.ones(2, 6)
    noisy = noisy_condition(Cond(cond.hidden, torch.randn(2, 4000, generator=seeded(2)), sizes), 0.2, seeded(1))
    added = (noisy.hidden - cond.hidden).flatten(1).std(1)
    torch.testing.assert_close(added, 0.2 * scale, rtol=0.03, atol=0)
    assert noisy.pooled is not None
    assert (noisy.pooled - torch.randn(2, 4000, generator=seeded(2))).std().item() == pytest.approx(0.2, rel=0.05)
    assert noisy.sizes is sizes
    assert noisy_condition(cond, 0.0, seeded()) is cond


def test_condition_noise_does_not_reach_the_gradient() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    noisy_condition(Cond(hidden), 0.5, seeded()).hidden.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.ones(1, 3, 4))


def test_noise_has_the_latents_dtype_and_is_drawn_alike_for_all() -> None:
    like = torch.zeros(2, 3, 4, 4)
    wide, narrow = (draw_noise(x, torch.Generator().manual_seed(0)) for x in (like, like.bfloat16()))
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())
