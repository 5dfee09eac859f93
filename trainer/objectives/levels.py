"""Which noise levels are trained how often: densities over the place of a timestep in 0..1, the noisiest at 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trainer.args import LevelsArgs

Distribution = Callable[[Tensor, LevelsArgs], Tensor]  # levels in 0..1 -> share of draws at or below each


def _logit_normal(x: Tensor, args: LevelsArgs) -> Tensor:
    return torch.special.ndtr((torch.logit(x) - args.mean) / args.std)


def _mode(x: Tensor, args: LevelsArgs) -> Tensor:
    """The inverse of g(u) = u + scale (cos^2(pi u / 2) - 1 + u), which draws a level of a uniform u; by halving."""
    low, high = torch.zeros_like(x), torch.ones_like(x)
    for _ in range(60):
        middle = (low + high) / 2
        below = middle + args.scale * (torch.cos(math.pi * middle / 2) ** 2 - 1 + middle) < x
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


DISTRIBUTIONS: Mapping[str, Distribution] = {
    "uniform": lambda x, _: x,
    "linear": lambda x, args: x + args.lean * (x**2 - x),  # density 1 + lean (2 x - 1)
    "cosine": lambda x, args: x - args.lean * torch.sin(math.pi * x) / math.pi,  # density 1 - lean cos(pi x)
    "late": lambda x, args: x**args.power,
    "logit_normal": _logit_normal,  # arXiv 2403.03206, section 3.1
    "mode": _mode,  # the same
}


def draw_timesteps(
    count: int,
    low: int,
    high: int,
    generator: torch.Generator,
    args: LevelsArgs | None = None,
    *,
    steps: int = 1000,
    size: tuple[int, int] = (1, 1),
) -> Tensor:
    """[count] int64 on the CPU in low..high-1, as often as their levels are dense there; uniform without `args`.

    Args:
        steps: timesteps of the path.
        size: latent height and width, by which the shift may be.
    """
    if args is None or args == LevelsArgs.model_validate({}):
        return torch.randint(low, high, (count,), generator=generator)
    upto = shares(low, high, steps, args, size).cumsum(0)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    return (low + torch.searchsorted(upto, drawn, right=True)).clamp(max=high - 1)


def shares(low: int, high: int, steps: int, args: LevelsArgs, size: tuple[int, int]) -> Tensor:
    """[high - low] float64: the share of draws of each timestep t, that of the levels t/steps..(t + 1)/steps.

    ValueError where the density leaves nothing in the window.
    """
    edges = torch.arange(low, high + 1, dtype=torch.float64) / steps
    shift = shift_of(args, size)
    mass = DISTRIBUTIONS[args.density](edges / (shift - (shift - 1) * edges), args).diff()
    total = float(mass.sum())
    if not total > 0:
        raise ValueError(
            f"objective.levels.density {args.density} draws nothing between t_min {low} and t_max {high}; widen the "
            "window, or move the density into it"
        )
    return mass / total


def shift_of(args: LevelsArgs, size: tuple[int, int]) -> float:
    """The a of x -> a x / (1 + (a - 1) x), which moves levels (arXiv 2403.03206, equation 23).

    By size it is the root of the area over that of shift_base squared (the same equation), or Flux's: e^mu, where mu
    is linear in the number of 2 x 2 patches, 0.5 at 256 and 1.15 at 4096 (diffusers, calculate_shift).
    """
    height, width = size
    if args.shift_by == "sd3":
        return math.sqrt(height * width) / args.shift_base
    if args.shift_by == "flux":
        patches = height * width / 4
        return math.exp(0.5 + (1.15 - 0.5) * (patches - 256) / (4096 - 256))
    return args.shift
