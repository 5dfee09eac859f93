"""The section `optim`: optimizers, rates over time, rules for single layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from trainer.args.section import Probability, Section, parsed
from trainer.registry import nearest

CURVES = ("constant", "linear", "cosine", "restarts", "polynomial", "exponential", "rex")
PIVOTS = ("adaptive", "pivot_rows", "pivot_adapter", "hard_pivot")


class CurveArgs(Section):
    """A learning rate over progress. Left out, the curve is for whoever has the section to say."""

    curve: str = Field(
        "",
        description="learning rate over progress: constant, linear, cosine, restarts (cycles cosines), polynomial "
        "(power), exponential, rex; adaptive: rows fall while the adapter rises (its halves: pivot_rows, "
        "pivot_adapter); hard_pivot: rows until optim.pivot, then the adapter; or module:attr, file.py:attr "
        "[default: adaptive where rows and an adapter are trained, else constant]",
    )
    warmup: float = Field(0.0, ge=0.0, description="spent rising to the peak: updates (1 and more) or share of the run")
    ramp: Literal["linear", "exponential"] = Field(
        "linear", description="how the warm-up rises: from 0 in a straight line, or exponentially from a sixth"
    )
    floor: float = Field(0.0, ge=0.0, lt=1.0, description="share of the peak that a falling curve ends at")
    cycles: int = Field(1, ge=1, le=1000, description="cosines of restarts")
    power: float = Field(1.0, gt=0.0, le=100.0, description="exponent of polynomial; 1 is linear")

    @model_validator(mode="after")
    def _curve_is_whole(self) -> CurveArgs:
        """The curve is one, and options that would do nothing are mistakes."""
        if self.curve and ":" not in self.curve and self.curve not in (*CURVES, *PIVOTS):
            meant = nearest(self.curve, (*CURVES, *PIVOTS))
            hint = f"; did you mean {meant}?" if meant else ""
            allowed = ", ".join((*CURVES, *PIVOTS))
            raise ValueError(f"curve {self.curve!r} is unknown{hint} (allowed: {allowed}, module:attr or file.py:attr)")
        if 0.9 < self.warmup < 1 or (self.warmup > 1 and self.warmup % 1):
            raise ValueError(f"warmup is {self.warmup:g}: give whole updates, or a share of the run up to 0.9")
        falls = self.curve in ("linear", "cosine", "restarts", "polynomial", "exponential", "rex")
        needless = {
            "warmup": bool(self.warmup) and (":" in self.curve or not (self.curve or self._rises_anyhow())),
            "ramp": self.ramp != "linear" and not (self.warmup and self.curve in (*CURVES, "hard_pivot")),
            "floor": bool(self.floor) and not falls,
            "cycles": self.cycles != 1 and self.curve != "restarts",
            "power": self.power != 1 and self.curve != "polynomial",
        }
        for option, is_so in needless.items():
            if is_so:
                if not self.curve:
                    raise ValueError(f"{option} is given, but not the curve that it is for; give curve too")
                raise ValueError(f"{option} would do nothing for curve {self.curve}; leave it out")
        if self.curve == "exponential" and not self.floor:
            raise ValueError(
                "curve exponential falls by the same ratio at each update and never to 0; give floor, say 0.01"
            )
        return self

    def _rises_anyhow(self) -> bool:
        """Whether a warm-up acts on the curve that holds where none is given."""
        return True


class ComponentOptim(CurveArgs):
    """Optimizer and learning-rate curve of one component (the denoiser's adapter, or the token rows)."""

    name: str = Field(
        "adamw",
        description="optimizer: one of torch's (adamw, adam, sgd, adafactor, muon ...), prodigy, which finds its own "
        "rate and takes lr 1, one of the extras (docs/optimizers.md), module:attr or file.py:attr",
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="peak learning rate [default: what fits the base's width (docs/optimizers.md), 1 where the "
        "optimizer finds its own]",
    )
    weight_decay: float = Field(0.0, ge=0.0, description="weight decay, decoupled where the optimizer is")
    betas: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = Field(
        (), description="moment decays [default: 0.9,0.99 for torch's and prodigy, an extra's own]"
    )
    eps: float | None = Field(
        None, gt=0, description="what keeps a division from dividing by 0 [default: the optimizer's own]"
    )
    options: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        description="more settings of the optimizer, by the names of its constructor: momentum=0.9, nesterov=true",
    )
    max_grad_norm: float | None = Field(
        None, ge=0, description="gradient norm it is clipped to; 0 is off [default: optim.max_grad_norm]"
    )

    @property
    def peak(self) -> float:
        """`lr`, of args that are filled in. ValueError: they are not."""
        if self.lr is None:
            raise ValueError("no learning rate was given, and none was filled in")
        return self.lr

    @field_validator("options")
    @classmethod
    def _as_json(cls, options: dict[str, Any]) -> dict[str, Any]:
        """A flag gives text: what reads as JSON is a number, a truth value or a list."""
        return {name: parsed(value) if isinstance(value, str) else value for name, value in options.items()}


class RuleArgs(CurveArgs):
    """Another rate, or another time, for some of the trained tensors."""

    match: str = Field(
        min_length=1,
        description="which tensors: a glob over the names of parameters and of the modules that they are in "
        "(*.attn2.*, mid_block), or re: and a regular expression; the first rule that matches a tensor holds",
    )
    lr_scale: float = Field(1.0, gt=0, le=1000.0, description="factor of the component's rate")
    after: Probability = Field(0.0, ge=0.0, lt=1.0, description="progress before which they are frozen")
    until: Probability = Field(1.0, gt=0.0, le=1.0, description="progress from which they are frozen")
    curve: str = Field("", description="learning rate over that time [default: the component's, over the whole run]")
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = Field("keep", description="precision that they are trained in")
    device: Literal["keep", "cpu"] = Field(
        "keep",
        description="where what the optimizer remembers of them waits between updates: cpu frees the GPU's memory",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_other_names(cls, given: object) -> object:
        """`from` and `to`, which Python keeps for itself, are `after` and `until`."""
        if not isinstance(given, Mapping):
            return given
        named = dict(cast("Mapping[str, object]", given))
        for other, name in (("from", "after"), ("to", "until")):
            if other in named:
                if name in named:
                    raise ValueError(f"{other} and {name} are two names for one thing; give one of them")
                named[name] = named.pop(other)
        return named

    @field_validator("match")
    @classmethod
    def _is_a_pattern(cls, match: str) -> str:
        try:
            re.compile(match.removeprefix("re:") if match.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"match {match!r} is no regular expression: {error}") from error
        return match

    @model_validator(mode="after")
    def _does_something(self) -> RuleArgs:
        if self.after >= self.until:
            raise ValueError(f"rule {self.match}: after ({self.after:g}) must be below until ({self.until:g})")
        if not self.model_dump(exclude={"match"}, exclude_defaults=True):
            raise ValueError(f"rule {self.match} changes nothing; give lr_scale, after, until, curve, dtype or device")
        if self.curve in PIVOTS:
            raise ValueError(f"rule {self.match}: {self.curve} is for components, not for single layers")
        return self

    def _rises_anyhow(self) -> bool:
        return False


class OptimArgs(Section):
    adapter: ComponentOptim = Field(
        default_factory=lambda: ComponentOptim.model_validate({}), description="the adapter's"
    )
    rows: ComponentOptim = Field(
        default_factory=lambda: ComponentOptim.model_validate({}), description="the token rows'"
    )
    text: ComponentOptim = Field(
        default_factory=lambda: ComponentOptim.model_validate({}), description="the adapter's on the text encoders"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradient norm each component is clipped to; 0 is off")
    pivot: Probability = Field(0.5, gt=0.0, lt=1.0, description="progress at which hard_pivot changes over")
    rules: tuple[RuleArgs, ...] = Field(
        (), description="rates and times of single layers, as a JSON list: [{match: *attn2*, lr_scale: 0.5}]"
    )

    @model_validator(mode="after")
    def _rules_differ(self) -> OptimArgs:
        twice = [rule.match for i, rule in enumerate(self.rules) if rule.match in {r.match for r in self.rules[:i]}]
        if twice:
            raise ValueError(f"rules has two rules for {twice[0]}; make them one")
        return self

    @model_validator(mode="after")
    def _pivot_is_used(self) -> OptimArgs:
        used = "hard_pivot" in (self.adapter.curve, self.rows.curve)
        if self.pivot != type(self).model_fields["pivot"].default and not used:
            raise ValueError(f"pivot is {self.pivot:g}, but no curve is hard_pivot; set it, or leave pivot out")
        return self

    def clip(self, component: ComponentOptim) -> float:
        """The norm that a component's gradients are clipped to; 0 is off."""
        return self.max_grad_norm if component.max_grad_norm is None else component.max_grad_norm
