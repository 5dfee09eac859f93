"""The sections `adapter` and `text`: what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from trainer.args.section import Probability, Section, check_regex


class EncodersArgs(Section):
    """The adapter's part on the text encoders. Its options are the denoiser's where they are left out."""

    train: bool = Field(False, description="train the text encoders' layers too, as component text of optim")
    rank: int | None = Field(None, ge=1, le=1024, description="as adapter.rank [default: adapter.rank]")
    alpha: float | None = Field(None, gt=0, description="as adapter.alpha [default: as for the denoiser]")
    targets: Literal["attention", "attention+ff", "all", "norm"] = Field(
        "attention", description="layers of each text encoder"
    )
    match: tuple[str, ...] = Field((), description="as adapter.match, for the text encoders")
    exclude: tuple[str, ...] = Field((), description="as adapter.exclude, for the text encoders")

    @model_validator(mode="after")
    def _is_on(self) -> EncodersArgs:
        if not self.train and self != EncodersArgs.model_construct():
            raise ValueError("adapter.text is given, but adapter.text.train is off; turn it on, or leave the rest out")
        return self


# Option of AdapterArgs -> the kinds of the project's own that it does something for; what is not here, all have.
_ADAPTER_OPTIONS: dict[str, tuple[str, ...]] = {
    "rank": ("lora", "dora", "loha", "lokr"),
    "alpha": ("lora", "dora", "loha", "lokr"),
    "ranks": ("lora", "dora", "loha", "lokr"),
    "alphas": ("lora", "dora", "loha", "lokr"),
    "rank_stabilised": ("lora", "dora"),
    "lora_plus": ("lora", "dora"),
    "dropout": ("lora", "dora"),
    "rank_dropout": ("lora", "dora", "loha", "lokr"),
    "axis": ("dora",),
    "factor": ("lokr",),
    "block": ("oft",),
    "bias": ("full",),
    "max_norm": ("lora", "loha", "lokr", "full"),
    "start": ("lora", "dora", "loha", "lokr", "full"),
}
ADAPTER_KINDS = ("lora", "dora", "loha", "lokr", "oft", "full")


class AdapterArgs(Section):
    kind: str = Field(
        "lora",
        description="adapter on layers: a name of trainer.adapters (lora, dora, loha, lokr, oft, full), or none",
    )
    rank: int = Field(8, ge=1, le=1024, description="inner dimension of the low-rank update")
    alpha: float | None = Field(None, gt=0, description="numerator of the scale alpha/rank [default: rank, scale 1]")
    targets: Literal[
        "attention",
        "attention+ff",
        "attention+ff+conv",
        "all",
        "norm",
        "b-lora",
        "b-lora-content",
        "b-lora-style",
    ] = Field(
        "attention+ff",
        description="layers of the denoiser that are trained; all is every Linear and convolution, norm every norm, "
        "b-lora the two blocks of SDXL that carry content and style",
    )
    match: tuple[str, ...] = Field(
        (), description="regexes instead of targets: a layer in whose path one of them is found is trained"
    )
    exclude: tuple[str, ...] = Field((), description="regexes: a layer in whose path one is found is left out")
    ranks: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(
        default_factory=dict[str, int], description="regex=rank for layers of another rank; the first found counts"
    )
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict[str, float], description="regex=alpha for layers of another alpha; the first found counts"
    )
    rank_stabilised: bool = Field(False, description="scale by alpha/sqrt(rank), which large ranks need (rsLoRA)")
    lora_plus: float = Field(1.0, ge=1.0, le=1000.0, description="how many times faster B learns than A (LoRA+: 16)")
    dropout: Probability = Field(0.0, ge=0.0, lt=1.0, description="dropout on the update's input")
    rank_dropout: Probability = Field(
        0.0, ge=0.0, lt=1.0, description="share of ranks left out at each pass (loha, lokr: of output channels)"
    )
    module_dropout: Probability = Field(
        0.0, ge=0.0, lt=1.0, description="share of layers that are the base's own at each pass"
    )
    axis: Literal["input", "output"] = Field(
        "input", description="what DoRA's lengths are of: columns, as clients read it, or rows, as PEFT has it"
    )
    factor: int = Field(
        -1, ge=-1, le=1024, description="side of LoKr's smaller matrix at most; -1 makes the two about equal"
    )
    block: int = Field(32, ge=2, le=1024, description="side of OFT's rotations; it divides the layers' input widths")
    bias: bool = Field(True, description="train biases beside the weights (kind full)")
    max_norm: float | None = Field(None, gt=0, description="cap of each layer's |W' - W| [default: none]")
    l1: float = Field(0.0, ge=0.0, description="weight of the mean |W' - W| in the loss, which keeps updates sparse")
    start: str | None = Field(
        None, description="adapter of the same kind and ranks that is trained on (docs/imports.md) [default: none]"
    )
    text: EncodersArgs = Field(
        default_factory=lambda: EncodersArgs.model_validate({}), description="the same on the text encoders"
    )

    @field_validator("match", "exclude")
    @classmethod
    def _are_regexes(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            check_regex(pattern)
        return patterns

    @field_validator("ranks", "alphas")
    @classmethod
    def _have_regexes(cls, values: dict[str, float]) -> dict[str, float]:
        for pattern in values:
            check_regex(pattern)
        return values

    @model_validator(mode="after")
    def _fits_the_kind(self) -> AdapterArgs:
        """Options that would do nothing are mistakes. What an adapter from elsewhere reads is not known."""
        if self.kind in ADAPTER_KINDS:
            default = AdapterArgs.model_construct()
            for option, kinds in _ADAPTER_OPTIONS.items():
                if self.kind not in kinds and getattr(self, option) != getattr(default, option):
                    raise ValueError(
                        f"adapter.{option} is {getattr(self, option)}, which does nothing for adapter.kind {self.kind} "
                        f"(it is for {', '.join(kinds)}); leave it out"
                    )
        if self.match and self.targets != type(self).model_fields["targets"].default:
            raise ValueError(f"adapter.match is given, and so is adapter.targets ({self.targets}); choose one of them")
        if self.kind == "none" and self.text.train:
            raise ValueError("adapter.text.train is on, but adapter.kind is none; choose the kind, or turn it off")
        return self

    @property
    def scaled_by_alpha(self) -> bool:
        """Whether alpha means something, and has a default."""
        return self.kind not in ADAPTER_KINDS or self.kind in _ADAPTER_OPTIONS["alpha"]

    def for_text(self) -> AdapterArgs:
        """The section as it holds for the text encoders."""
        own = self.text
        rank = own.rank or self.rank
        alpha = own.alpha or (float(rank) if own.rank and self.scaled_by_alpha else self.alpha)
        changes = {"targets": own.targets, "match": own.match, "exclude": own.exclude, "rank": rank, "alpha": alpha}
        return self.model_copy(update={**changes, "ranks": {}, "alphas": {}})


class TextArgs(Section):
    tokens: int = Field(0, ge=0, le=16, description="vectors learned for the trigger; 0 turns textual inversion off")
    init: Literal["random", "words", "similarity"] = Field(
        "random",
        description="start of the rows: random at the table's mean std, mean of init_words, or words first and "
        "then closer to the pictures (64 of each trigger at most) under the base's CLIP",
    )
    init_words: str | None = Field(None, description="words whose mean row starts the new ones (init: words)")
    std_weight: float = Field(
        0.01, ge=0.0, description="weight of the regulariser that holds the rows' std at the table's"
    )
    covariance_weight: float = Field(
        0.0, ge=0.0, description="weight of the distance between the rows' covariance and the table's"
    )
    condition_weight: float = Field(
        0.0, ge=0.0, description="weight of holding the condition of a photo of the trigger at the norm of other words'"
    )

    @model_validator(mode="after")
    def _rows_are_there(self) -> TextArgs:
        for option, weight in (
            ("covariance_weight", self.covariance_weight),
            ("condition_weight", self.condition_weight),
        ):
            if weight and not self.tokens:
                raise ValueError(
                    f"text.{option} is {weight:g}, but text.tokens is 0: there are no rows; give 1 or more"
                )
        return self
