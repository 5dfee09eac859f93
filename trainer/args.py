"""The typed args tree: every option of a run with its type, default, unit and bound.

Nothing here touches torch, the disk, the clock or the environment. The tree is frozen;
values left at `None` are derived by `trainer.run.resolve` and saved resolved in args.json.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = float


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DataArgs(Section):
    source: str = Field(description="folder or .zip of training pictures; x.txt beside x.png is its caption")
    trigger: str = Field("TOK", min_length=1, description="word in captions and prompts that stands for the concept")
    caption: str = Field(
        "a {trigger}",
        description="caption for pictures that come without one; {trigger} stands for the trigger, and it is put "
        "first where a caption lacks it",
    )
    resolution: int | None = Field(
        None,
        ge=16,
        le=4096,
        description="pixels; side of the square whose area every bucket keeps [default: the base's own]",
    )
    class_words: tuple[str, ...] = Field(
        (), description="what the concept is or is like (dog, cat): stand in for the trigger where the prior is kept"
    )
    flip: bool = Field(False, description="mirror pictures at random (off: many subjects are not symmetric)")
    caption_dropout: Probability = Field(
        0.05, ge=0.0, le=1.0, description="share of captions replaced by the empty one, which guidance relies on"
    )
    masks: bool = Field(False, description="weight the loss by x.mask.png (white: learn) where a picture has one")


class ModelArgs(Section):
    family: str = Field("sd15", description="model family: a name of trainer.models, or module:attr")
    base: str = Field(
        "testbed/base", description="diffusers folder, hub id, or single-file .safetensors checkpoint to train on"
    )
    revision: str | None = Field(None, description="commit or tag of a hub id")
    config: str | None = Field(
        None,
        description="diffusers folder or hub id whose configs and tokenizer a single-file base is read with "
        "[default: what diffusers finds on the hub]",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="precision of the frozen weights")
    prediction: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="what the base predicts; auto reads the scheduler's config"
    )


class AdapterArgs(Section):
    kind: str = Field("lora", description="adapter on the denoiser: a name of trainer.adapters, or none")
    rank: int = Field(8, ge=1, le=1024, description="inner dimension of the low-rank update")
    alpha: float | None = Field(None, gt=0, description="numerator of the scale alpha/rank [default: rank, scale 1]")
    targets: Literal["attention", "attention+ff", "attention+ff+conv"] = Field(
        "attention", description="layers that get an update"
    )
    dropout: Probability = Field(0.0, ge=0.0, lt=1.0, description="dropout on the update's input")


class TextArgs(Section):
    tokens: int = Field(0, ge=0, le=16, description="vectors learned for the trigger; 0 turns textual inversion off")
    init: Literal["random", "words", "similarity"] = Field(
        "random",
        description="start of the rows: random at the table's mean std, mean of init_words, or words first and "
        "then closer to the pictures under the base's CLIP",
    )
    init_words: str | None = Field(None, description="words whose mean row starts the new ones (init: words)")
    std_weight: float = Field(
        0.01, ge=0.0, description="weight of the regulariser that holds the rows' std at the table's"
    )


class ObjectiveArgs(Section):
    kind: str = Field("denoise", description="objective: a name of trainer.objectives")
    min_snr_gamma: float | None = Field(
        None, gt=0, description="clip of the min-SNR weighting, 5 in the paper [default: off]"
    )
    offset_noise: float = Field(0.0, ge=0.0, le=1.0, description="std of the per-channel constant added to the noise")
    mask_floor: Probability = Field(0.0, ge=0.0, le=1.0, description="loss weight outside a mask")
    prior_weight: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="weight of drawing class_words as before training: needs no class pictures; 0 is off, else a step "
        "takes about twice as long",
    )
    t_min: int = Field(0, ge=0, description="lowest training timestep, inclusive")
    t_max: int = Field(1000, ge=1, description="highest training timestep, exclusive")

    @model_validator(mode="after")
    def _window(self) -> ObjectiveArgs:
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        return self


class ComponentOptim(Section):
    """Optimizer and learning-rate curve of one component (the denoiser's adapter, or the token rows)."""

    name: Literal["adamw", "prodigy"] = Field(
        "adamw", description="optimizer; prodigy finds its own rate, give it lr 1"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0.0, description="decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.99), description="moment decays")
    curve: Literal["constant", "linear", "cosine", "pivot_rows", "pivot_adapter"] = Field(
        "constant", description="learning rate over progress; pivot_* are the two halves of the adaptive pivot"
    )
    warmup: Probability = Field(0.0, ge=0.0, le=0.9, description="fraction of the run spent rising to the peak")


class RowsOptim(ComponentOptim):
    """The same with the default of the token rows, which need larger steps."""

    lr: float = Field(1e-2, gt=0, description="peak learning rate")


class OptimArgs(Section):
    adapter: ComponentOptim = Field(
        default_factory=lambda: ComponentOptim.model_validate({}), description="the adapter's"
    )
    rows: RowsOptim = Field(default_factory=lambda: RowsOptim.model_validate({}), description="the token rows'")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm each component is clipped to")


class SampleArgs(Section):
    prompts: tuple[str, ...] = Field(
        (),
        description="prompts of the sample grid; {trigger} stands for the trigger [default: the first captions]",
    )
    every: int = Field(0, ge=0, description="updates between sample rows; 0 samples before and after only")
    steps: int = Field(25, ge=1, le=1000, description="denoising steps")
    guidance: float = Field(3.0, ge=0.0, le=100.0, description="classifier-free guidance scale")
    seed: int = Field(1234, ge=0, description="seed of the first picture; the next have the next seeds")
    strengths: tuple[float, ...] = Field((0.5, 1.0), description="adapter strengths of the last rows of the grid")


class HooksArgs(Section):
    tensorboard: bool = Field(True, description="write TensorBoard event files to RUN/tensorboard")
    extra: tuple[str, ...] = Field((), description="more hooks: table names, module:attr or file.py:attr")


class RuntimeArgs(Section):
    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$", description="name of the run and of its export files"
    )
    out: str = Field("runs", description="folder the run directory is made in")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of data order, noise, dropout and initial weights")
    steps: int | None = Field(None, ge=1, description="optimizer updates [default: 30 for each picture, 300 to 2000]")
    batch_size: int = Field(4, ge=1, description="pictures in one forward and backward")
    accumulate: int = Field(1, ge=1, description="forwards and backwards for one update")
    checkpoint_every: int = Field(100, ge=1, description="updates between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept; the rest are deleted")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="where to train; auto takes a GPU if there is one"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads [default: torch's choice]")


class TrainArgs(Section):
    data: DataArgs
    model: ModelArgs = Field(default_factory=lambda: ModelArgs.model_validate({}))
    adapter: AdapterArgs = Field(default_factory=lambda: AdapterArgs.model_validate({}))
    text: TextArgs = Field(default_factory=lambda: TextArgs.model_validate({}))
    objective: ObjectiveArgs = Field(default_factory=lambda: ObjectiveArgs.model_validate({}))
    optim: OptimArgs = Field(default_factory=lambda: OptimArgs.model_validate({}))
    sample: SampleArgs = Field(default_factory=lambda: SampleArgs.model_validate({}))
    hooks: HooksArgs = Field(default_factory=lambda: HooksArgs.model_validate({}))
    runtime: RuntimeArgs = Field(default_factory=lambda: RuntimeArgs.model_validate({}))

    @model_validator(mode="after")
    def _something_trains(self) -> TrainArgs:
        if self.adapter.kind == "none" and self.text.tokens == 0:
            raise ValueError("nothing would be trained: adapter.kind is none and text.tokens is 0; set one of them")
        if self.text.init == "words" and self.text.tokens and not self.text.init_words:
            raise ValueError("text.init is words, but text.init_words is empty")
        if self.objective.prior_weight and not self.data.class_words:
            raise ValueError(
                f"objective.prior_weight is {self.objective.prior_weight:g}, but data.class_words names no word that "
                "stands in for the trigger; give the concept's class (dog, person), or a prior_weight of 0"
            )
        return self
