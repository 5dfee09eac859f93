"""The noise path: x_t = alpha_t x0 + sigma_t eps, and what a model on it predicts.

T training levels, t in 0..T-1 (int64, [B]), the noisiest last; x0, eps, xt, v are [B, ...] of one shape and dtype.
The tables are float32 on the CPU; results follow the device and dtype of the tensors given.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Target = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
"""As diffusers spells them: eps; v = alpha eps - sigma x0 (arXiv 2202.00512); x0; eps - x0 (arXiv 2210.02747)."""


class NoisePath:
    """A variance-preserving path given by its alphas_cumprod [T], and the model's target on it."""

    targets: tuple[Target, ...] = ("epsilon", "v_prediction", "sample")

    def __init__(self, alphas_cumprod: Tensor, target: Target) -> None:
        if alphas_cumprod.ndim != 1 or not bool(((alphas_cumprod >= 0) & (alphas_cumprod < 1)).all()):
            raise ValueError("alphas_cumprod must be one row of numbers, each at least 0 and below 1")
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float32).clone()
        self._lay(self.alphas_cumprod.sqrt(), (1.0 - self.alphas_cumprod).sqrt(), target)

    def _lay(self, alphas: Tensor, sigmas: Tensor, target: Target) -> None:
        if target not in self.targets:
            raise ValueError(f"prediction target {target!r} is not supported; it is one of {', '.join(self.targets)}")
        self.target: Target = target
        self._alphas, self._sigmas = alphas, sigmas

    @staticmethod
    def from_scheduler(scheduler: Any, prediction: str = "auto") -> NoisePath:
        """The path of a diffusers scheduler, of the DDPM family or FlowMatchEulerDiscreteScheduler.

        Args:
            prediction: the target; `auto` takes it from the config, in which a flow scheduler does not name one.
        """
        config: Any = scheduler.config
        if hasattr(scheduler, "alphas_cumprod"):
            target: Any = config.prediction_type if prediction == "auto" else prediction
            return NoisePath(scheduler.alphas_cumprod, target)
        flow: Any = "flow_prediction" if prediction == "auto" else prediction
        shift = 1.0 if config.use_dynamic_shifting else config.shift  # a dynamic one depends on the picture's size
        return FlowPath.shifted(config.num_train_timesteps, shift, flow)

    @property
    def steps(self) -> int:
        """Number of training levels T."""
        return len(self._sigmas)

    def alpha(self, t: Tensor) -> Tensor:
        """Share of the picture at t, [B] float32 on t's device."""
        return self._alphas[t.cpu()].to(t.device)

    def sigma(self, t: Tensor) -> Tensor:
        """Share of the noise at t, [B] float32 on t's device."""
        return self._sigmas[t.cpu()].to(t.device)

    def snr(self, t: Tensor) -> Tensor:
        """(alpha / sigma)^2 at t, [B] float32; 0 where the path ends in pure noise."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def time(self, t: Tensor) -> Tensor:
        """What a model is told that the level is: here t itself."""
        return t

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of the clean x0 and the noise eps."""
        alpha, sigma = self._at(t, x0)
        return alpha * x0 + sigma * eps

    def target_of(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a perfect model would predict at t, by `target`."""
        if self.target == "epsilon":
            return eps
        if self.target == "sample":
            return x0
        if self.target == "flow_prediction":
            return eps - x0
        alpha, sigma = self._at(t, x0)
        return alpha * eps - sigma * x0

    def x0_of(self, pred: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The clean picture that the prediction `pred` at x_t stands for (eps: undefined where alpha is 0)."""
        alpha, sigma = self._at(t, xt)
        if self.target == "epsilon":
            return (xt - sigma * pred) / alpha
        if self.target == "sample":
            return pred
        if self.target == "flow_prediction":
            return xt - sigma * pred
        return alpha * xt - sigma * pred

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, shaped to multiply `like`."""
        shape = (-1, *([1] * (like.ndim - 1)))
        return self.alpha(t).to(like).reshape(shape), self.sigma(t).to(like).reshape(shape)


class FlowPath(NoisePath):
    """The straight path of flow matching, x_t = (1 - s) x0 + s eps (arXiv 2210.02747, 2209.03003), by its s [T]."""

    targets = ("flow_prediction",)

    def __init__(self, sigmas: Tensor, target: Target = "flow_prediction") -> None:
        if sigmas.ndim != 1 or not bool(((sigmas > 0) & (sigmas <= 1)).all()):
            raise ValueError("the sigmas of a flow path must be one row of numbers, each above 0 and at most 1")
        sigmas = sigmas.detach().to("cpu", torch.float32).clone()
        self._lay(1.0 - sigmas, sigmas, target)

    @classmethod
    def shifted(cls, steps: int = 1000, shift: float = 1.0, target: Target = "flow_prediction") -> FlowPath:
        """`steps` even levels up to 1, each moved to shift s / (1 + (shift - 1) s) (arXiv 2403.03206, equation 23)."""
        sigmas = torch.arange(1, steps + 1, dtype=torch.float32) / steps
        return cls(shift * sigmas / (1 + (shift - 1) * sigmas), target)

    def time(self, t: Tensor) -> Tensor:
        """s in thousandths (of `steps`), float32, as models of this kind are told it."""
        return self.sigma(t) * self.steps
