"""The standard loss: the error of the prediction at a random noise level."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.args import ObjectiveArgs
from trainer.objectives.distances import distance
from trainer.objectives.levels import draw_timesteps, shares
from trainer.objectives.noise import draw_noise, gamma_shape, noisy_condition, perturbed
from trainer.objectives.weights import check_weights, weight_of
from trainer.path import NoisePath
from trainer.types import Batch, Loss, Predict


class Denoise:
    """Draws (t, noise) once, predicts once; a mean over pictures, each weighted by its level, mask and folder."""

    def __init__(self, args: ObjectiveArgs, path: NoisePath, frozen: Predict) -> None:
        """`frozen` predicts without the adapters, and without gradients."""
        if args.t_max > path.steps:
            raise ValueError(
                f"objective.t_max is {args.t_max}, but the base has {path.steps} timesteps; give {path.steps} or less"
            )
        shares(args.t_min, args.t_max, path.steps, args.levels, (64, 64))  # which refuses a window without any
        self.args = args
        self.path = path
        self.frozen = frozen
        self.gamma = args.min_snr_gamma or 0.0  # which only weightings use that have one
        if args.weighting != "none":
            check_weights(path, (args.t_min, args.t_max), args.weighting, self.gamma, args.weight)

    def __call__(self, predict: Predict, batch: Batch) -> Loss:
        """Total: the weighted loss and its extra terms, each times its weight.

        Terms: raw, the plain mean squared error, and weighted, what pictures are trained on; where they are asked
        for, attention, prior and outside, before their weights, and attention_weighted and so on, after.

        The prior is kept as in Learning without Forgetting (arXiv 1606.09282): on the same noisy pictures, with a
        class word for the trigger, the prediction stays what it is without the adapters. No class pictures are needed.
        The frozen model reads `batch.base` where text is trained: what it says must not move with what is trained.
        """
        args, x0, probe = self.args, batch.latents, batch.probe
        t = self._timesteps(batch) if probe is None else probe.timesteps(self._timesteps(batch))
        eps = self._noise(batch, t) if probe is None else probe.noise(self._noise(batch, t))
        xt = self.path.noisy(x0, perturbed(eps, args.noise.perturbation, batch.generator), t)
        cond = noisy_condition(batch.cond, args.noise.condition, batch.generator)
        t_there, target = t.to(x0.device), self.path.target_of(x0, eps, t)
        with nullcontext() if batch.watch is None else batch.watch() as looks:
            pred = predict(xt, t_there, cond)
        if probe is not None:
            pred = probe.prediction(pred, xt, t_there, cond, target)
        total = self._per_picture(pred, target, t, batch).mean()
        terms = {"raw": ((pred.detach().float() - target.float()) ** 2).flatten(1).mean(1).mean()}
        terms["weighted"] = total.detach()
        if looks is not None and batch.mask is not None:
            looked = astray(looks(), batch.mask).mean()
            total = _joined(total, terms, "attention", looked, args.attention.weight)
        outside = batch.mask if args.mask_prior else None
        if outside is None and batch.prior is None:
            return Loss(total, terms)
        kept = self.frozen(xt, t_there, batch.base or batch.prior or batch.cond)
        if outside is not None:
            held = outside_mean(distance(pred, kept, args.distance, self.path, t), outside).mean()
            total = _joined(total, terms, "outside", held, args.mask_prior)
        if batch.prior is not None:
            prior = distance(predict(xt, t_there, batch.prior), kept, args.distance, self.path, t).mean()
            total = _joined(total, terms, "prior", prior, args.prior_weight)
        return Loss(total, terms)

    def _timesteps(self, batch: Batch) -> Tensor:
        args, (height, width) = self.args, batch.latents.shape[-2:]
        return draw_timesteps(
            len(batch.latents),
            args.t_min,
            args.t_max,
            batch.generator,
            args.levels,
            steps=self.path.steps,
            size=(height, width),
        )

    def _noise(self, batch: Batch, t: Tensor) -> Tensor:
        args = self.args.noise
        shape = gamma_shape(self.path.snr(t), args.gamma) if args.gamma else None
        return draw_noise(batch.latents, batch.generator, self.args.offset_noise, pyramid=args.pyramid, shape=shape)

    def _per_picture(self, pred: Tensor, target: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """[B]: the error of each picture, weighted by mask, level and folder."""
        args = self.args
        error = distance(pred, target, args.distance, self.path, t)
        each = error.flatten(1).mean(1) if batch.mask is None else masked_mean(error, batch.mask, args.mask_floor)
        if args.weighting != "none":
            each = each * weight_of(self.path, t, args.weighting, self.gamma, args.weight).to(each.device)
        return each if batch.weight is None else each * batch.weight


def _joined(total: Tensor, terms: dict[str, Tensor], name: str, term: Tensor, weight: float) -> Tensor:
    """The total with an extra term, which `terms` then tells before and after its weight."""
    terms[name], terms[f"{name}_weighted"] = term.detach(), weight * term.detach()
    return total + weight * term


def masked_mean(error: Tensor, mask: Tensor, floor: float) -> Tensor:
    """[B]: for each picture sum(m * l) / sum(m), so that a small mask counts as much as a large one.

    Args:
        error: [B, C, H, W].
        mask: [B, 1, H, W] in 0..1; a picture whose mask is empty counts as unmasked.
        floor: weight where the mask is 0.
    """
    empty = mask.flatten(1).sum(1).reshape(-1, 1, 1, 1) == 0
    weight = torch.where(empty, torch.ones_like(mask), floor + (1.0 - floor) * mask).expand_as(error)
    return (weight * error).flatten(1).sum(1) / weight.flatten(1).sum(1)


def outside_mean(error: Tensor, mask: Tensor) -> Tensor:
    """[B]: the same outside the mask; 0 for a picture whose mask is empty, which is unmasked, or leaves nothing out."""
    empty = mask.flatten(1).sum(1).reshape(-1, 1, 1, 1) == 0
    weight = torch.where(empty, torch.zeros_like(mask), 1.0 - mask).expand_as(error)
    area = weight.flatten(1).sum(1)
    return (weight * error).flatten(1).sum(1) / torch.where(area == 0, torch.ones_like(area), area)


def astray(maps: Tensor, mask: Tensor) -> Tensor:
    """[B]: (1 - sum(m a) / sum(a))^2, a a map of what is looked at; the energy of arXiv 2304.03373, by a mask.

    0 for a picture whose map is 0 everywhere, whose caption lacks the word, or whose mask is empty, which is unmasked.

    Args:
        maps: [B, h, w], 0 or more.
        mask: [B, 1, H, W] in 0..1, averaged over each place of a map.
    """
    inside = F.adaptive_avg_pool2d(mask, (maps.shape[1], maps.shape[2]))[:, 0]
    looked = maps.flatten(1).sum(1)
    counts = (looked > 0) & (mask.flatten(1).sum(1) > 0)
    share = (inside * maps).flatten(1).sum(1) / torch.where(counts, looked, torch.ones_like(looked))
    return torch.where(counts, 1.0 - share, torch.zeros_like(share)) ** 2
