"""How much each noise level counts: factors of the loss by signal to noise ratio.

A weighting is one function of the snr for the error in x0. An eps error is an x0 error times snr, a v error one times
snr + 1, a flow error one times (1 + sqrt(snr))^2 (s = 1 / (1 + sqrt(snr)), x0 = x_t - s v); what a weighting is for
another target follows from that. No paper states one for flow.

- min_snr: arXiv 2303.09556, for x0, eps and v; so in diffusers' scripts and sd-scripts for eps and v. At
  snr 0 the authors' code takes 1, and what is here the limit: 1 for eps, 0 for x0 and v.
- soft_min_snr: arXiv 2401.11605; in k-diffusion (layers.py, Denoiser) it is 1 / (sigma^2 + sigma_data^2) of the error
  in x0, so that gamma is sigma_data^-2, and sigma^2 is 1 / snr.
- edm: lambda(sigma) of arXiv 2206.00364, table 1, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, likewise.
- debiased: arXiv 2310.08442, for eps. For v sd-scripts has 1 / (snr + 1) and OneTrainer 1 / sqrt(snr + 1), both with
  snr at most 1000: not the same in terms of x0.
- p2: arXiv 2204.00227, on the plain loss in eps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trainer.args import WeightArgs
from trainer.path import NoisePath

Formula = Callable[[Tensor, float, WeightArgs], Tensor]  # snr [B], gamma, options -> [B]

OF_X0: Mapping[str, Formula] = {
    "min_snr": lambda snr, gamma, _: snr.clamp(max=gamma),
    "soft_min_snr": lambda snr, gamma, _: snr * gamma / (snr + gamma),
    "debiased": lambda snr, _, __: snr.sqrt(),
    "p2": lambda snr, _, args: snr / (args.p2_k + snr) ** args.p2_gamma,
    "edm": lambda snr, _, args: snr + args.sigma_data**-2,
}
OF_EPS: Mapping[str, Formula] = {  # the same over snr, written so that they have a limit at snr 0 where there is one
    "min_snr": lambda snr, gamma, _: (gamma / snr).clamp(max=1.0),
    "soft_min_snr": lambda snr, gamma, _: gamma / (snr + gamma),
    "debiased": lambda snr, _, __: snr.rsqrt(),
    "p2": lambda snr, _, args: (args.p2_k + snr) ** -args.p2_gamma,
    "edm": lambda snr, _, args: 1.0 + args.sigma_data**-2 / snr,
}


def weight_of(path: NoisePath, t: Tensor, kind: str, gamma: float, args: WeightArgs) -> Tensor:
    """Weights [B] float32 of the squared error of the path's own target.

    Args:
        kind: a name of OF_X0.
        gamma: that of min_snr and soft_min_snr.
    """
    snr = path.snr(t)
    if path.target == "epsilon":
        return OF_EPS[kind](snr, gamma, args)
    weight = OF_X0[kind](snr, gamma, args)
    if path.target == "v_prediction":
        return weight / (snr + 1.0)
    if path.target == "flow_prediction":
        return weight / (1.0 + snr.sqrt()) ** 2
    return weight


def check_weights(path: NoisePath, window: tuple[int, int], kind: str, gamma: float, args: WeightArgs) -> None:
    """ValueError where a level of the window, its end exclusive, counts infinitely often, or the kind does nothing."""
    if kind == "edm" and path.target == "v_prediction" and args.sigma_data == 1.0:
        raise ValueError(
            "objective.weight.kind edm with sigma_data 1 is 1 at every level of a base whose target is v_prediction; "
            "give another sigma_data, say 0.5, or leave the weighting out"
        )
    levels = torch.arange(*window)
    endless = levels[~weight_of(path, levels, kind, gamma, args).isfinite()]
    if len(endless):
        first = int(endless[0])
        raise ValueError(
            f"objective.weight.kind {kind} is infinite at timestep {first} of this base, whose path ends in pure noise "
            f"and whose target is {path.target}; lower objective.t_max to {first}, or take min_snr"
        )
