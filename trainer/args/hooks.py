"""The section `hooks`: what acts inside a run."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from trainer.args.section import Section, SwitchedArgs


class EmaArgs(SwitchedArgs):
    """A moving average of what is trained."""

    switches = ("decay",)
    decay: float | None = Field(
        None, gt=0.0, lt=1.0, description="share of the average kept at each update, 0.999 is usual [default: off]"
    )
    warmup: int = Field(
        10,
        ge=0,
        description="w: update n keeps at most (1 + n) / (w + n), so the start is soon forgotten; 0 is off",
    )
    samples: bool = Field(True, description="draw samples with the average")
    export: bool = Field(True, description="export the average")

    @model_validator(mode="after")
    def _for_something(self) -> EmaArgs:
        if self.decay is not None and not (self.samples or self.export):
            raise ValueError("an average that neither samples nor export use does nothing; leave decay out")
        return self


class GradStatsArgs(SwitchedArgs):
    """Figures of the gradients."""

    switches = ("every",)
    every: int = Field(0, ge=0, description="updates between norms of the gradients by block; 0 is off")
    dead_after: int = Field(
        20, ge=2, description="updates in a row with no gradient at all after which a parameter is named in the log"
    )


class ActivationsArgs(SwitchedArgs):
    """Figures of what layers put out."""

    switches = ("layers",)
    layers: tuple[str, ...] = Field(
        (), description="names of layers, with * for any text: denoiser.mid_block, text_encoder.*.fc1 [default: off]"
    )
    every: int = Field(10, ge=1, description="updates between figures")


class NoiseJitterArgs(SwitchedArgs):
    """Noise that is weaker or stronger than its timestep says."""

    switches = ("strength",)
    strength: float = Field(
        0.0, ge=0.0, lt=1.0, description="each picture's noise is multiplied by 1 - strength to 1 + strength; 0 is off"
    )


class TeacherArgs(SwitchedArgs):
    """A second frozen base, whose predictions are learned beside the pictures."""

    switches = ("base",)
    base: str | None = Field(
        None,
        description="folder, hub id or single file, of model.base's family and noise path [default: off]",
    )
    revision: str | None = Field(None, description="commit or tag of a hub id")
    config: str | None = Field(None, description="as model.config, for a single file")
    weight: float = Field(1.0, gt=0.0, le=100.0, description="of the teacher's term in the loss")


class CollapseArgs(SwitchedArgs):
    """When a run is given up: the last checkpoint, the samples and the export are made as at its end."""

    switches = ("loss", "samples")
    loss: float | None = Field(
        None,
        gt=1.0,
        description="the median raw loss of `window` steps is so many times the lowest there was [default: off]",
    )
    window: int = Field(50, ge=2, description="steps whose median raw loss is compared")
    samples: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="samples have less than this share of the contrast, or of the difference between prompts, that "
        "they had before training [default: off]",
    )

    @model_validator(mode="after")
    def _window_used(self) -> CollapseArgs:
        if self.loss is None and "window" in self._given():
            raise ValueError("window does nothing unless loss is set")
        return self


class BestArgs(SwitchedArgs):
    """The best of the checkpoints is exported in place of the last."""

    switches = ("pictures",)
    pictures: int = Field(
        0,
        ge=0,
        le=100,
        description="pictures drawn of each prompt at each checkpoint (runtime.checkpoint_every) to find the best one, "
        "which is exported if it is clearly better than the last; 0 is off",
    )
    ordinary: tuple[str, ...] = Field(
        (),
        description="prompts whose pictures should stay as they are [default: those of sample.prompts without the "
        "trigger]",
    )
    base: str | None = Field(
        None, description="folder of the CLIPModel that looks at them, with its tokenizer [default: the base's own]"
    )


class HookUse(Section):
    """A hook with options of its own."""

    use: str = Field(description="a name of trainer.hooks, module:attr or file.py:attr")
    options: dict[str, Any] = Field(default_factory=dict[str, Any], description="what the hook declares")


class HooksArgs(Section):
    tensorboard: bool = Field(True, description="write TensorBoard event files to RUN/tensorboard")
    ema: EmaArgs = Field(default_factory=lambda: EmaArgs.model_validate({}))
    grad_stats: GradStatsArgs = Field(default_factory=lambda: GradStatsArgs.model_validate({}))
    activations: ActivationsArgs = Field(default_factory=lambda: ActivationsArgs.model_validate({}))
    noise_jitter: NoiseJitterArgs = Field(default_factory=lambda: NoiseJitterArgs.model_validate({}))
    teacher: TeacherArgs = Field(default_factory=lambda: TeacherArgs.model_validate({}))
    best: BestArgs = Field(default_factory=lambda: BestArgs.model_validate({}))
    collapse: CollapseArgs = Field(default_factory=lambda: CollapseArgs.model_validate({}))
    extra: tuple[str | HookUse, ...] = Field(
        (),
        description="more hooks: table names, module:attr or file.py:attr; with options as "
        '{"use": "file.py:attr", "options": {...}}',
    )
