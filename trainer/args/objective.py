"""The section `objective`: what is learned of a picture."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainer.args.section import Probability, Section, only_with


class LevelsArgs(Section):
    """Which noise levels are trained how often, beside the window t_min to t_max.

    A level is a timestep's place in 0..1, the noisiest at 1; on a flow path it is the share of noise.
    """

    density: Literal["uniform", "linear", "cosine", "late", "logit_normal", "mode"] = Field(
        "uniform", description="how often each level is drawn"
    )
    lean: float = Field(
        1.0, ge=-1.0, le=1.0, description="linear and cosine: 1 leans all the way to noise, -1 to clean pictures"
    )
    power: float = Field(
        3.0, gt=0.0, le=20.0, description="late: the density is level^(power - 1), so below 1 it is early"
    )
    mean: float = Field(0.0, ge=-10.0, le=10.0, description="logit_normal: mean of the level's logit; above 0 is noisy")
    std: float = Field(1.0, gt=0.0, le=10.0, description="logit_normal: std of the level's logit")
    scale: float = Field(
        1.29, ge=-1.0, le=1.75, description="mode: above 0 favours the middle, below 0 both ends (SD3's s)"
    )
    shift: float = Field(1.0, gt=0.0, le=100.0, description="moves what is drawn: above 1 towards noise")
    shift_by: Literal["none", "sd3", "flux"] = Field(
        "none", description="shift by the picture's size: sd3 by the root of its area, flux by its number of patches"
    )
    shift_base: int = Field(32, ge=1, description="latents; side of the square for which the shift of sd3 is 1")

    @model_validator(mode="after")
    def _whole(self) -> LevelsArgs:
        users = {"lean": ("linear", "cosine"), "power": ("late",), "mean": ("logit_normal",), "std": ("logit_normal",)}
        only_with(self, "density", {**users, "scale": ("mode",)})
        only_with(self, "shift_by", {"shift": ("none",), "shift_base": ("sd3",)})
        return self


class WeightArgs(Section):
    """How much each noise level counts in the loss."""

    kind: Literal["auto", "none", "min_snr", "soft_min_snr", "debiased", "p2", "edm"] = Field(
        "auto", description="auto is min_snr where min_snr_gamma is given, else none"
    )
    p2_k: float = Field(1.0, gt=0.0, le=100.0, description="p2: k of 1 / (k + snr)^gamma")
    p2_gamma: float = Field(1.0, gt=0.0, le=4.0, description="p2: gamma of the same; the paper has 0.5 and 1")
    sigma_data: float = Field(0.5, gt=0.0, le=10.0, description="edm: std of the latents as the weighting takes it")

    @model_validator(mode="after")
    def _whole(self) -> WeightArgs:
        only_with(self, "kind", {"p2_k": ("p2",), "p2_gamma": ("p2",), "sigma_data": ("edm",)})
        return self


class DistanceArgs(Section):
    """How far a prediction is from its target."""

    kind: Literal["l2", "l1", "huber", "smooth_l1"] = Field("l2", description="the error of each element")
    delta: float = Field(
        0.1, gt=0.0, lt=1.0, description="huber and smooth_l1: errors far above it count by their size, not its square"
    )
    schedule: Literal["constant", "exponential", "snr"] = Field(
        "constant",
        description="huber and smooth_l1: delta at every level, or from 1 at clean pictures to delta at noise, "
        "exponentially in the timestep or by snr",
    )

    @model_validator(mode="after")
    def _whole(self) -> DistanceArgs:
        only_with(self, "kind", {"delta": ("huber", "smooth_l1"), "schedule": ("huber", "smooth_l1")})
        return self


class NoiseArgs(Section):
    """What else is drawn, beside the plain noise and offset_noise."""

    pyramid: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of noise of half the size, its square of a quarter and so on; 0 is off"
    )
    perturbation: float = Field(
        0.0, ge=0.0, le=1.0, description="std of noise that the input gets and the target does not, 0.1 in the paper"
    )
    condition: float = Field(0.0, ge=0.0, le=1.0, description="noise on the text condition, in its own std")
    gamma: float = Field(
        0.0,
        ge=0.0,
        le=10.0,
        description="theta_0 of noise drawn from a gamma distribution, 0.001 in the paper; 0 is off",
    )


class AttentionArgs(Section):
    """Where the denoiser looks at the trigger's tokens, by masks."""

    weight: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="weight of the trigger's cross-attention that falls outside a picture's mask; 0 is off",
    )
    cell: int = Field(
        4,
        ge=1,
        le=64,
        description="latents; side of what one element of an attention map stands for: the layers of that resolution "
        "count (4 is 16 x 16 at 512 px, which SD1.5 and SDXL have)",
    )

    @model_validator(mode="after")
    def _is_on(self) -> AttentionArgs:
        if self.cell != 4 and not self.weight:
            raise ValueError("attention.cell is given, but attention.weight is 0: give a weight, or leave cell out")
        return self


class ObjectiveArgs(Section):
    kind: str = Field("denoise", description="objective: a name of trainer.objectives")
    levels: LevelsArgs = Field(
        default_factory=lambda: LevelsArgs.model_validate({}), description="which noise levels are trained how often"
    )
    weight: WeightArgs = Field(
        default_factory=lambda: WeightArgs.model_validate({}), description="how much each noise level counts"
    )
    distance: DistanceArgs = Field(
        default_factory=lambda: DistanceArgs.model_validate({}), description="how an error is measured"
    )
    noise: NoiseArgs = Field(default_factory=lambda: NoiseArgs.model_validate({}), description="what else is drawn")
    attention: AttentionArgs = Field(
        default_factory=lambda: AttentionArgs.model_validate({}), description="where the trigger's tokens are looked at"
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="clip of the min-SNR weighting, 5 in the paper [default: off]"
    )
    offset_noise: float = Field(0.0, ge=0.0, le=1.0, description="std of the per-channel constant added to the noise")
    mask_floor: Probability = Field(0.0, ge=0.0, le=1.0, description="loss weight outside a mask")
    mask_prior: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="weight of predicting outside a mask what the base predicts there; 0 is off, else a step takes "
        "about a third longer",
    )
    prior_weight: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="weight of drawing class_words as before training: needs no class pictures; 0 is off, else a step "
        "takes about twice as long",
    )
    t_min: int = Field(0, ge=0, description="lowest training timestep, inclusive")
    t_max: int = Field(1000, ge=1, description="highest training timestep, exclusive")

    @property
    def weighting(self) -> str:
        """The weighting in force: none, or a name of trainer.objectives.weights."""
        if self.weight.kind == "auto":
            return "none" if self.min_snr_gamma is None else "min_snr"
        return self.weight.kind

    @model_validator(mode="after")
    def _window(self) -> ObjectiveArgs:
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        return self

    @model_validator(mode="after")
    def _gamma_fits(self) -> ObjectiveArgs:
        clips = ("min_snr", "soft_min_snr")
        if self.weighting in clips and self.min_snr_gamma is None:
            raise ValueError(f"objective.weight.kind is {self.weighting}, which needs objective.min_snr_gamma, say 5")
        if self.weighting not in clips and self.min_snr_gamma is not None:
            raise ValueError(
                f"objective.min_snr_gamma is given, but objective.weight.kind is {self.weighting}; leave one of them "
                f"out, or take {' or '.join(clips)}"
            )
        return self
