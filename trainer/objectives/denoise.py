"""The standard loss: the squared error of the prediction at a random noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.args import ObjectiveArgs
from trainer.objectives.levels import draw_timesteps, min_snr_weight
from trainer.objectives.noise import draw_noise
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
        self.args = args
        self.path = path
        self.frozen = frozen

    def __call__(self, predict: Predict, batch: Batch) -> Loss:
        """Total: the weighted loss. Terms: raw, the plain mean squared error; prior, the same from the frozen model.

        The prior is kept as in Learning without Forgetting (arXiv 1606.09282): on the same noisy pictures, with a
        class word for the trigger, the prediction stays what it is without the adapters. No class pictures are needed.
        """
        args, x0 = self.args, batch.latents
        t = draw_timesteps(len(x0), args.t_min, args.t_max, batch.generator)
        eps = draw_noise(x0, batch.generator, args.offset_noise)
        xt, t_there = self.path.noisy(x0, eps, t), t.to(x0.device)
        pred = predict(xt, t_there, batch.cond)
        error = (pred.float() - self.path.target_of(x0, eps, t).float()) ** 2
        raw = error.flatten(1).mean(1)
        per_picture = raw if batch.mask is None else masked_mean(error, batch.mask, args.mask_floor)
        if args.min_snr_gamma is not None:
            per_picture = per_picture * min_snr_weight(self.path, t, args.min_snr_gamma).to(x0.device)
        if batch.weight is not None:
            per_picture = per_picture * batch.weight
        total, terms = per_picture.mean(), {"raw": raw.detach().mean()}
        if batch.prior is not None:
            kept = self.frozen(xt, t_there, batch.prior)
            prior = ((predict(xt, t_there, batch.prior).float() - kept.float()) ** 2).mean()
            total, terms["prior"] = total + args.prior_weight * prior, prior.detach()
        return Loss(total, terms)


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
