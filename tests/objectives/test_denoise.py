"""The standard loss against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.args import ObjectiveArgs
from trainer.objectives.denoise import Denoise, astray, masked_mean, outside_mean
from trainer.objectives.levels import draw_timesteps
from trainer.objectives.noise import draw_noise
from trainer.objectives.weights import weight_of
from trainer.path import FlowPath, NoisePath
from trainer.types import Batch, Cond

ACP = torch.tensor([0.9, 0.5, 0.2])  # snr 9, 1, 0.25


def batch(x0: Tensor, mask: Tensor | None = None, seed: int = 0) -> Batch:
    names = tuple(f"p{i}" for i in range(len(x0)))
    return Batch(x0, Cond(torch.zeros(len(x0), 1, 1)), names, torch.Generator().manual_seed(seed), mask)


class Recorder:
    """A denoiser that predicts a constant and remembers what it was shown."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.xt, self.t, self.cond = xt, t, cond
        return torch.full_like(xt, self.value)


def unasked(xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
    raise AssertionError("the frozen model is asked only where a prior is kept")


def objective(target: Any, t: int, **options: Any) -> Denoise:
    """The objective at the one timestep `t`."""
    args = ObjectiveArgs.model_validate({"t_min": t, "t_max": t + 1, **options})
    return Denoise(args, NoisePath(ACP, target), unasked)


def test_a_picture_counts_as_its_weight_says() -> None:
    x0, predict = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1)), Recorder(0.25)
    loss = objective("epsilon", 1)(predict, replace(batch(x0), weight=torch.tensor([2.0, 0.0, 0.5])))
    each = ((0.25 - noise_of(x0, predict, 1)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss.total, (2 * each[0] + 0.5 * each[2]) / 3)
    torch.testing.assert_close(loss.terms["raw"], each.mean())


def noise_of(x0: Tensor, seen: Recorder, t: int) -> Tensor:
    """The noise that the denoiser was shown."""
    return (seen.xt - ACP[t].sqrt() * x0) / (1 - ACP[t]).sqrt()


def test_eps_target() -> None:
    x0, predict = torch.full((2, 1, 2, 2), 3.0), Recorder(0.25)
    loss = objective("epsilon", 1)(predict, batch(x0))
    expected = ((0.25 - noise_of(x0, predict, 1)) ** 2).mean()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.terms["raw"], expected)


def test_v_target() -> None:
    x0, predict = torch.full((2, 1, 2, 2), 3.0), Recorder(0.25)
    loss = objective("v_prediction", 2)(predict, batch(x0))
    v = 0.2**0.5 * noise_of(x0, predict, 2) - 0.8**0.5 * x0
    torch.testing.assert_close(loss.total, ((0.25 - v) ** 2).mean())


@pytest.mark.parametrize(
    ("target", "t", "gamma", "weight"),
    [
        ("epsilon", 0, 5.0, 5 / 9),  # min(9, 5) / 9
        ("epsilon", 1, 5.0, 1.0),  # min(1, 5) / 1
        ("epsilon", 2, 0.1, 0.4),  # min(0.25, 0.1) / 0.25
        ("v_prediction", 0, 5.0, 0.5),  # min(9, 5) / (9 + 1)
        ("v_prediction", 1, 5.0, 0.5),  # min(1, 5) / (1 + 1)
        ("v_prediction", 2, 5.0, 0.2),  # 0.25 / 1.25
    ],
)
def test_min_snr_has_the_form_of_its_target(target: Any, t: int, gamma: float, weight: float) -> None:
    alone = weight_of(NoisePath(ACP, target), torch.tensor([t]), "min_snr", gamma, ObjectiveArgs().weight)
    torch.testing.assert_close(alone, torch.tensor([weight]))
    plain = objective(target, t)(Recorder(), batch(torch.ones(2, 1, 2, 2)))
    weighted = objective(target, t, min_snr_gamma=gamma)(Recorder(), batch(torch.ones(2, 1, 2, 2)))
    torch.testing.assert_close(weighted.total, plain.total * weight)
    assert torch.equal(weighted.terms["raw"], plain.terms["raw"])


def test_min_snr_weights_each_picture_by_its_own_level() -> None:
    path, predict = NoisePath(ACP, "v_prediction"), Recorder()
    x0 = torch.linspace(-1, 1, 24).reshape(6, 1, 2, 2)
    loss = Denoise(ObjectiveArgs(t_max=3, min_snr_gamma=5.0), path, unasked)(predict, batch(x0))
    assert len(set(predict.t.tolist())) > 1
    by_hand = 0.0
    for i, t in enumerate(predict.t.tolist()):
        eps = (predict.xt[i] - ACP[t].sqrt() * x0[i]) / (1 - ACP[t]).sqrt()
        v = ACP[t].sqrt() * eps - (1 - ACP[t]).sqrt() * x0[i]
        by_hand += (v**2).mean() * {0: 0.5, 1: 0.5, 2: 0.2}[t] / 6
    torch.testing.assert_close(loss.total, by_hand)


def test_offset_noise_is_one_constant_for_each_picture_and_channel() -> None:
    like = torch.zeros(64, 8, 4, 4)
    plain = draw_noise(like, torch.Generator().manual_seed(0))
    offset = draw_noise(like, torch.Generator().manual_seed(0), offset=0.5) - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset))
    assert len(set(offset[0, :, 0, 0].tolist())) == 8
    assert offset[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.1)
    assert plain.std().item() == pytest.approx(1.0, rel=0.05)


def test_offset_noise_reaches_the_denoiser_and_the_target() -> None:
    x0, plain, shifted = torch.ones(2, 1, 4, 4), Recorder(), Recorder()
    objective("epsilon", 1)(plain, batch(x0))
    loss = objective("epsilon", 1, offset_noise=1.0)(shifted, batch(x0))
    added = (shifted.xt - plain.xt) / 0.5**0.5
    assert added.abs().min() > 1e-3
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added))
    torch.testing.assert_close(loss.total, (noise_of(x0, shifted, 1) ** 2).mean())


def test_timesteps_fill_the_window_and_nothing_else() -> None:
    drawn = draw_timesteps(2000, 3, 7, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64
    assert sorted(set(drawn.tolist())) == [3, 4, 5, 6]


def test_a_window_beyond_the_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t_max is 1000.*3 timesteps"):
        Denoise(ObjectiveArgs(), NoisePath(ACP, "epsilon"), unasked)


def test_masked_mean_is_the_mean_inside_each_mask() -> None:
    error = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[10.0, 20.0], [30.0, 40.0]]]]).repeat(1, 3, 1, 1)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 0.5], [0.0, 1.0]]]])
    torch.testing.assert_close(masked_mean(error, mask, 0.0), torch.tensor([1.0, (0.5 * 20 + 40) / 1.5]))


def test_mask_floor_is_the_weight_outside() -> None:
    error = torch.tensor([[[[1.0, 3.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]]])
    torch.testing.assert_close(masked_mean(error, mask, 0.25), torch.tensor([(1 + 0.25 * 3) / 1.25]))
    torch.testing.assert_close(masked_mean(error, mask, 1.0), torch.tensor([2.0]))
    grey = torch.tensor([[[[1.0, 0.5]]]])
    torch.testing.assert_close(masked_mean(error, grey, 0.25), torch.tensor([(1 + 0.625 * 3) / 1.625]))


def test_an_empty_mask_counts_as_unmasked() -> None:
    error = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]])
    mask = torch.tensor([[[[0.0, 0.0]]], [[[0.0, 1.0]]]])
    torch.testing.assert_close(masked_mean(error, mask, 0.0), torch.tensor([2.0, 7.0]))


def test_the_mask_decides_where_gradients_go() -> None:
    prediction = torch.zeros(1, 1, 2, 2, requires_grad=True)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])

    def predict(xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return prediction + 0.0 * xt

    loss = objective("epsilon", 1)(predict, batch(torch.ones(1, 1, 2, 2), mask))
    loss.total.backward()
    assert prediction.grad is not None
    assert (prediction.grad != 0).tolist() == [[[[True, False], [False, False]]]]
    assert loss.terms["raw"] != loss.total.detach()


def test_the_same_generator_gives_the_same_loss_and_another_a_different_one() -> None:
    def losses(seed: int) -> Tensor:
        return Denoise(ObjectiveArgs(t_max=3), NoisePath(ACP, "epsilon"), unasked)(
            Recorder(), batch(torch.ones(4, 1, 2, 2), seed=seed)
        ).total

    state = torch.get_rng_state()
    assert losses(1) == losses(1) != losses(2)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


def test_the_prior_is_the_frozen_models_prediction_of_the_class_words() -> None:
    x0, frozen, predict = torch.full((2, 1, 2, 2), 3.0), Recorder(0.5), Recorder(0.25)
    plain = objective("epsilon", 1)(predict, batch(x0))
    kept = Denoise(ObjectiveArgs(t_min=1, t_max=2, prior_weight=4.0), NoisePath(ACP, "epsilon"), frozen)
    prior = Cond(torch.ones(2, 1, 1))
    loss = kept(predict, replace(batch(x0), prior=prior))
    torch.testing.assert_close(loss.terms["prior"], torch.tensor(0.0625))  # (0.5 - 0.25)^2
    torch.testing.assert_close(loss.total, plain.total + 4.0 * 0.0625)
    assert torch.equal(frozen.xt, predict.xt)
    assert torch.equal(frozen.t, predict.t)
    assert (predict.cond, frozen.cond) == (prior, prior)  # the last that each was asked for


def kept(t: int, frozen: Recorder, **options: Any) -> Denoise:
    args = ObjectiveArgs.model_validate({"t_min": t, "t_max": t + 1, **options})
    return Denoise(args, NoisePath(ACP, "epsilon"), frozen)


MASK = torch.tensor([[[[1.0, 0.0], [0.5, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])  # the second is empty: unmasked


def test_outside_the_mask_the_target_is_the_frozen_models_prediction() -> None:
    x0, frozen, predict = torch.full((2, 1, 2, 2), 3.0), Recorder(0.75), Recorder(0.25)
    plain = objective("epsilon", 1)(predict, batch(x0, MASK))
    cond = Cond(torch.ones(2, 1, 1))
    loss = kept(1, frozen, mask_prior=4.0)(predict, replace(batch(x0, MASK), cond=cond))
    torch.testing.assert_close(loss.terms["outside"], torch.tensor((0.25 + 0.0) / 2))  # (0.75 - 0.25)^2; none
    torch.testing.assert_close(loss.total, plain.total + 4.0 * 0.125)
    torch.testing.assert_close(loss.terms["weighted"], plain.total)
    assert torch.equal(frozen.xt, predict.xt)
    assert torch.equal(frozen.t, predict.t)
    assert frozen.cond is cond
    words = Cond(torch.full((2, 1, 1), 2.0))
    kept(1, frozen, mask_prior=4.0)(predict, replace(batch(x0, MASK), prior=words))
    assert frozen.cond is words  # the class words say what the base would draw there


def test_the_frozen_model_reads_what_the_base_itself_reads() -> None:
    x0, frozen, predict = torch.full((2, 1, 2, 2), 3.0), Recorder(0.75), Recorder(0.25)
    live, words, own = (Cond(torch.full((2, 1, 1), float(i))) for i in range(3))
    given = replace(batch(x0, MASK), cond=live, base=own)
    kept(1, frozen, mask_prior=1.0)(predict, given)
    assert (frozen.cond, predict.cond) == (own, live)
    kept(1, frozen, prior_weight=1.0)(predict, replace(given, prior=words))
    assert (frozen.cond, predict.cond) == (own, words)  # of the prior, what is trained reads as it does by now


def test_the_prior_outside_a_mask_moves_only_what_is_outside() -> None:
    prediction = torch.zeros(2, 1, 2, 2, requires_grad=True)

    def predict(xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return prediction + 0.0 * xt

    x0 = torch.ones(2, 1, 2, 2)
    with_prior = kept(1, Recorder(0.75), mask_prior=1.0)(predict, batch(x0, MASK)).total
    (gradient,) = torch.autograd.grad(with_prior - objective("epsilon", 1)(predict, batch(x0, MASK)).total, prediction)
    assert (gradient != 0).squeeze().tolist() == [[[False, True], [True, True]], [[False, False], [False, False]]]
    assert gradient[0, 0, 1, 0] == gradient[0, 0, 0, 1] / 2


def test_a_picture_without_a_mask_has_nothing_outside() -> None:
    error = torch.ones(2, 3, 2, 2)
    assert outside_mean(error, torch.ones(2, 1, 2, 2)).tolist() == [0.0, 0.0]
    assert outside_mean(error, torch.full((2, 1, 2, 2), 0.5)).tolist() == [1.0, 1.0]


def test_input_perturbation_reaches_the_denoiser_and_not_the_target() -> None:
    x0, plain, seen = torch.ones(2, 1, 16, 16), Recorder(0.25), Recorder(0.25)
    expected = objective("epsilon", 1)(plain, batch(x0))
    loss = objective("epsilon", 1, noise={"perturbation": 0.1})(seen, batch(x0))
    torch.testing.assert_close(loss.total, expected.total)
    added = (seen.xt - plain.xt) / 0.5**0.5
    assert added.std().item() == pytest.approx(0.1, rel=0.1)
    objective("epsilon", 1)(plain, batch(x0, seed=1))
    objective("epsilon", 1, noise={"perturbation": 0.1})(seen, batch(x0, seed=1))
    assert ((seen.xt - plain.xt) / 0.5**0.5 - added).std() > 0.1  # another batch, another perturbation


def test_condition_noise_reaches_the_denoiser_and_not_the_prior() -> None:
    x0, predict = torch.ones(2, 1, 4, 4), Recorder()
    text = Cond(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(4)))
    objective("epsilon", 1, noise={"condition": 0.1})(predict, replace(batch(x0), cond=text))
    assert 0.05 < (predict.cond.hidden - text.hidden).std().item() < 0.15
    frozen = Recorder()
    loss = kept(1, frozen, prior_weight=1.0, noise={"condition": 0.1})
    loss(predict, replace(batch(x0), cond=text, prior=text))
    assert predict.cond is frozen.cond is text


@pytest.mark.parametrize("noise", [{"pyramid": 0.5}, {"gamma": 2.0}])
def test_other_noise_reaches_the_denoiser_and_the_target(noise: dict[str, float]) -> None:
    x0, plain, other = torch.ones(2, 1, 4, 4), Recorder(), Recorder()
    objective("epsilon", 1)(plain, batch(x0))
    loss = objective("epsilon", 1, noise=noise)(other, batch(x0))
    assert not torch.equal(other.xt, plain.xt)
    torch.testing.assert_close(loss.total, (noise_of(x0, other, 1) ** 2).mean())


def test_the_distance_and_the_weighting_make_the_loss_and_raw_stays() -> None:
    x0, predict = torch.full((2, 1, 2, 2), 3.0), Recorder(0.25)
    loss = objective("epsilon", 2, distance={"kind": "l1"}, weight={"kind": "debiased"})(predict, batch(x0))
    error = 0.25 - noise_of(x0, predict, 2)
    torch.testing.assert_close(loss.total, 2 * error.abs().mean())  # 1 / sqrt(0.25)
    torch.testing.assert_close(loss.terms["weighted"], loss.total)
    torch.testing.assert_close(loss.terms["raw"], (error**2).mean())


def test_the_x0_target_and_the_flow_target() -> None:
    x0, predict = torch.full((2, 1, 2, 2), 3.0), Recorder(0.25)
    torch.testing.assert_close(objective("sample", 2)(predict, batch(x0)).total, torch.tensor(2.75**2))
    flow = Denoise(ObjectiveArgs(t_min=1, t_max=2), FlowPath(torch.tensor([0.25, 0.5])), unasked)
    loss = flow(predict, batch(x0))
    eps = 2 * predict.xt - x0  # of xt = x0 / 2 + eps / 2
    torch.testing.assert_close(loss.total, ((0.25 - (eps - x0)) ** 2).mean())


def test_a_density_reaches_the_timesteps() -> None:
    predict, x0 = Recorder(), torch.zeros(2000, 1, 1, 1)
    cosine = Denoise(
        ObjectiveArgs.model_validate({"t_max": 3, "levels": {"density": "cosine"}}), NoisePath(ACP, "epsilon"), unasked
    )
    cosine(predict, batch(x0))
    counts = torch.bincount(predict.t, minlength=3) / 2000
    upto = torch.tensor([0.0, 1 / 3 - 0.2757, 2 / 3 - 0.2757, 1.0])  # x - sin(pi x) / pi at thirds
    torch.testing.assert_close(counts, upto.diff(), atol=0.03, rtol=0)


def test_timesteps_are_those_of_the_batchs_size_in_the_order_drawn() -> None:
    predict = Recorder()
    args = ObjectiveArgs.model_validate({"t_max": 3, "levels": {"shift_by": "flux"}})
    Denoise(args, NoisePath(ACP, "epsilon"), unasked)(predict, batch(torch.zeros(200, 1, 4, 80)))
    generator = torch.Generator().manual_seed(0)
    expected = draw_timesteps(200, 0, 3, generator, args.levels, steps=3, size=(4, 80))
    assert predict.t.tolist() == expected.tolist()


def test_gamma_noise_has_the_shape_of_its_level() -> None:
    x0, seen, generator = torch.ones(2, 1, 4, 4), Recorder(), torch.Generator().manual_seed(0)
    objective("epsilon", 2, noise={"gamma": 2.0})(seen, batch(x0))
    draw_timesteps(2, 2, 3, generator)
    expected = draw_noise(x0, generator, shape=torch.full((2,), 1 / (0.25 * 4.0)))  # snr 0.25
    torch.testing.assert_close(noise_of(x0, seen, 2), expected)


def test_what_is_kept_is_measured_by_the_same_distance() -> None:
    x0, frozen, predict = torch.full((2, 1, 2, 2), 3.0), Recorder(0.75), Recorder(0.25)
    l1 = kept(1, frozen, mask_prior=1.0, prior_weight=1.0, distance={"kind": "l1"})
    loss = l1(predict, replace(batch(x0, MASK), prior=Cond(torch.ones(2, 1, 1))))
    torch.testing.assert_close(loss.terms["outside"], torch.tensor(0.25))  # 0.5 and none
    torch.testing.assert_close(loss.terms["prior"], torch.tensor(0.5))


class Meddler:
    """A probe that writes down what it is told, and changes it."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def timesteps(self, t: Tensor) -> Tensor:
        self.told.append("timesteps")
        return torch.full_like(t, 2)

    def noise(self, eps: Tensor) -> Tensor:
        self.told.append("noise")
        return torch.full_like(eps, 0.5)

    def prediction(self, pred: Tensor, xt: Tensor, t: Tensor, cond: Cond, target: Tensor) -> Tensor:
        self.told.append("prediction")
        self.seen = pred, xt, t, cond, target
        return pred + 1.0


def test_a_probe_is_told_in_turn_and_what_it_says_is_trained() -> None:
    x0, predict, probe = torch.full((2, 1, 2, 2), 3.0), Recorder(0.25), Meddler()
    plan = Denoise(ObjectiveArgs(t_max=3, prior_weight=2.0), NoisePath(ACP, "epsilon"), Recorder(0.5))
    words = Cond(torch.ones(2, 1, 1))
    loss = plan(predict, replace(batch(x0), probe=probe, prior=words))
    assert probe.told == ["timesteps", "noise", "prediction"]
    pred, xt, t, cond, target = probe.seen
    assert (pred.unique().item(), t.tolist(), target.unique().item()) == (0.25, [2, 2], 0.5)
    torch.testing.assert_close(xt, 0.2**0.5 * x0 + 0.8**0.5 * 0.5)
    assert cond is not words
    torch.testing.assert_close(loss.terms["raw"], torch.tensor(0.75**2))
    torch.testing.assert_close(loss.terms["prior"], torch.tensor(0.25**2))
    torch.testing.assert_close(loss.terms["prior_weighted"], torch.tensor(2 * 0.25**2))
    torch.testing.assert_close(loss.total, loss.terms["weighted"] + loss.terms["prior_weighted"])


MAPS = torch.tensor([[[0.3, 0.1], [0.4, 0.2]], [[0.0, 0.0], [0.0, 0.0]], [[0.5, 0.1], [0.1, 0.1]]])
HALVES = torch.zeros(3, 1, 4, 4)
HALVES[0, :, :2, :2], HALVES[0, :, 2:, 0], HALVES[1, :, 0] = 1.0, 1.0, 1.0  # the third is empty: unmasked


def test_what_is_looked_at_outside_the_mask() -> None:
    whole = torch.ones(3, 1, 4, 4)
    # of the first: 0.3 whole, half of 0.4, in 1.0
    torch.testing.assert_close(astray(MAPS, HALVES), torch.tensor([0.25, 0.0, 0.0]))
    torch.testing.assert_close(astray(2 * MAPS, HALVES), torch.tensor([0.25, 0.0, 0.0]))
    torch.testing.assert_close(astray(MAPS, whole), torch.zeros(3), atol=1e-7, rtol=0)


def test_what_is_looked_at_moves_into_the_mask_and_nothing_else_has_a_gradient() -> None:
    maps = MAPS.clone().requires_grad_()
    astray(maps, HALVES).sum().backward()
    assert maps.grad is not None
    # (1 - s)^2, s = (0.3 + 0.2) / 1: -2 (1 - s) (m - s), whatever the total
    torch.testing.assert_close(maps.grad[0], torch.tensor([[-0.5, 0.5], [0.0, 0.5]]))
    assert maps.grad[1:].abs().max() == 0


def watch(told: list[str]) -> Callable[[], Any]:
    @contextmanager
    def watching() -> Generator[Callable[[], Tensor]]:
        told.append("begin")
        yield lambda: told.append("looked") or MAPS
        told.append("end")

    return watching


def test_the_objective_watches_its_own_prediction_and_adds_what_strays() -> None:
    x0, told = torch.ones(3, 1, 4, 4), list[str]()

    class Told(Recorder):
        def __call__(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
            told.append("predict")
            return super().__call__(xt, t, cond)

    words = Cond(torch.ones(3, 1, 1))
    given = replace(batch(x0, HALVES), prior=words, watch=watch(told))
    loss = kept(1, Recorder(0.5), prior_weight=1.0, attention={"weight": 3.0})(Told(0.25), given)
    assert told == ["begin", "predict", "end", "looked", "predict"]
    terms = loss.terms
    torch.testing.assert_close(terms["attention"], torch.tensor(0.25 / 3))
    torch.testing.assert_close(terms["attention_weighted"], torch.tensor(0.25))
    torch.testing.assert_close(loss.total, terms["weighted"] + terms["prior_weighted"] + 0.25)
    plain = kept(1, Recorder(0.5), prior_weight=1.0)(Recorder(0.25), replace(batch(x0, HALVES), prior=words))
    assert "attention" not in plain.terms
    torch.testing.assert_close(loss.total, plain.total + 0.25)
