"""How far a prediction is from its target, element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.args import DistanceArgs
from trainer.path import NoisePath


def distance(pred: Tensor, target: Tensor, args: DistanceArgs, path: NoisePath, t: Tensor) -> Tensor:
    """The error of each element, in float32.

    huber and smooth_l1 are the smooth forms that kohya's sd-scripts trains with (library/train_util.py,
    conditional_loss), with d the delta of the level: 2 d (sqrt(e^2 + d^2) - d), which is e^2 near 0 and 2 d |e| far
    off, and the same over d, which is e^2 / d near 0 and 2 |e| far off.
    """
    error = pred.float() - target.float()
    if args.kind == "l2":
        return error**2
    if args.kind == "l1":
        return error.abs()
    delta = delta_of(path, t, args).to(error.device).reshape(-1, *([1] * (error.ndim - 1)))
    smooth = 2.0 * ((error**2 + delta**2).sqrt() - delta)
    return delta * smooth if args.kind == "huber" else smooth


def delta_of(path: NoisePath, t: Tensor, args: DistanceArgs) -> Tensor:
    """The delta of each level, [B] float32, by args.schedule, as sd-scripts has them (get_huber_threshold_if_needed).

    With d the option: constant d; exponential d^(t/T), from 1 at clean pictures to d at noise; snr
    (1 - d) / (1 + sigma/alpha)^2 + d, between the same two.
    """
    if args.schedule == "constant":
        return torch.full((len(t),), args.delta)
    if args.schedule == "exponential":
        return args.delta ** (t.cpu().float() / path.steps)
    share = path.alpha(t) / (path.alpha(t) + path.sigma(t))  # 1 / (1 + sigma/alpha), which is 0 at pure noise
    return (1.0 - args.delta) * share**2 + args.delta
