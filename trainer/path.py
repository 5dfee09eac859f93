"""The noise path: x_t = alpha_t x0 + sigma_t eps, and what a model on it predicts.

T training timesteps, t in 0..T-1 (int64, [B]); x0, eps, xt, v are [B, ...] of one shape and dtype.
The tables are float32 on the CPU; results follow the device and dtype of the tensors given.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

Target = Literal["epsilon", "v_prediction"]


class NoisePath:
    """A variance-preserving path given by its alphas_cumprod [T], and the model's target on it."""

    def __init__(self, alphas_cumprod: Tensor, target: Target) -> None:
        if alphas_cumprod.ndim != 1 or not bool(((alphas_cumprod >= 0) & (alphas_cumprod < 1)).all()):
            raise ValueError("alphas_cumprod must be one row of numbers, each at least 0 and below 1")
        if target not in get_args(Target):
            raise ValueError(
                f"prediction target {target!r} is not supported; it is one of {', '.join(get_args(Target))}"
            )
        self.target: Target = target
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float32).clone()
        self._alphas = self.alphas_cumprod.sqrt()
        self._sigmas = (1.0 - self.alphas_cumprod).sqrt()

    @classmethod
    def from_scheduler(cls, scheduler: Any, prediction: str = "auto") -> NoisePath:
        """The path of a diffusers scheduler; `auto` takes the target from its config."""
        alphas_cumprod: Any = scheduler.alphas_cumprod
        target: Any = scheduler.config.prediction_type if prediction == "auto" else prediction
        return cls(alphas_cumprod, target)

    @property
    def steps(self) -> int:
        """Number of training timesteps T."""
        return len(self.alphas_cumprod)

    def alpha(self, t: Tensor) -> Tensor:
        """Share of the picture at t, [B] float32 on t's device."""
        return self._alphas[t.cpu()].to(t.device)

    def sigma(self, t: Tensor) -> Tensor:
        """Share of the noise at t, [B] float32 on t's device."""
        return self._sigmas[t.cpu()].to(t.device)

    def snr(self, t: Tensor) -> Tensor:
        """(alpha / sigma)^2 at t, [B] float32; 0 where the path ends in pure noise."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of the clean x0 and the noise eps."""
        alpha, sigma = self._at(t, x0)
        return alpha * x0 + sigma * eps

    def target_of(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a perfect model would predict at t: eps, or v = alpha eps - sigma x0 (arXiv 2202.00512)."""
        if self.target == "epsilon":
            return eps
        alpha, sigma = self._at(t, x0)
        return alpha * eps - sigma * x0

    def x0_of(self, pred: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The clean picture that the prediction `pred` at x_t stands for (eps: undefined where alpha is 0)."""
        alpha, sigma = self._at(t, xt)
        if self.target == "epsilon":
            return (xt - sigma * pred) / alpha
        return alpha * xt - sigma * pred

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, shaped to multiply `like`."""
        shape = (-1, *([1] * (like.ndim - 1)))
        return self.alpha(t).to(like).reshape(shape), self.sigma(t).to(like).reshape(shape)
