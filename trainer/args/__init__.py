"""The typed args tree: every option of a run with its type, default, unit and bound.

Nothing here touches torch, the disk, the clock or the environment. The tree is frozen;
values left at `None` are derived by `trainer.run.resolve` and saved resolved in args.json.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from trainer.args.adapter import ADAPTER_KINDS, AdapterArgs, EncodersArgs, TextArgs
from trainer.args.captions import CaptionModelArgs, TriggerModelArgs
from trainer.args.data import KEEP_SIDES, ConceptArgs, DataArgs, Mode, RegularisationArgs
from trainer.args.export import OF_WHOLE_MODELS, ExportArgs, Layout
from trainer.args.hooks import (
    ActivationsArgs,
    BestArgs,
    CollapseArgs,
    EmaArgs,
    GradStatsArgs,
    HooksArgs,
    HookUse,
    NoiseJitterArgs,
    TeacherArgs,
)
from trainer.args.masks import DetectArgs, MaskArgs, PersonArgs
from trainer.args.model import ModelArgs
from trainer.args.objective import AttentionArgs, DistanceArgs, LevelsArgs, NoiseArgs, ObjectiveArgs, WeightArgs
from trainer.args.optim import CURVES, PIVOTS, ComponentOptim, CurveArgs, OptimArgs, RuleArgs
from trainer.args.runtime import RuntimeArgs, SampleArgs
from trainer.args.section import Probability, Section, SwitchedArgs
from trainer.args.sources import AugmentArgs, HubArgs, LimitsArgs, UpscaleArgs

__all__ = [
    "CURVES",
    "KEEP_SIDES",
    "PIVOTS",
    "ActivationsArgs",
    "AdapterArgs",
    "AttentionArgs",
    "AugmentArgs",
    "BestArgs",
    "CaptionModelArgs",
    "CollapseArgs",
    "ComponentOptim",
    "ConceptArgs",
    "CurveArgs",
    "DataArgs",
    "DetectArgs",
    "DistanceArgs",
    "EmaArgs",
    "EncodersArgs",
    "ExportArgs",
    "GradStatsArgs",
    "HookUse",
    "HooksArgs",
    "HubArgs",
    "Layout",
    "LevelsArgs",
    "LimitsArgs",
    "MaskArgs",
    "Mode",
    "ModelArgs",
    "NoiseArgs",
    "NoiseJitterArgs",
    "ObjectiveArgs",
    "OptimArgs",
    "PersonArgs",
    "Probability",
    "RegularisationArgs",
    "RuleArgs",
    "RuntimeArgs",
    "SampleArgs",
    "Section",
    "SwitchedArgs",
    "TeacherArgs",
    "TextArgs",
    "TrainArgs",
    "TriggerModelArgs",
    "UpscaleArgs",
    "WeightArgs",
]


class TrainArgs(Section):
    data: DataArgs
    model: ModelArgs = Field(default_factory=lambda: ModelArgs.model_validate({}))
    adapter: AdapterArgs = Field(default_factory=lambda: AdapterArgs.model_validate({}))
    text: TextArgs = Field(default_factory=lambda: TextArgs.model_validate({}))
    objective: ObjectiveArgs = Field(default_factory=lambda: ObjectiveArgs.model_validate({}))
    optim: OptimArgs = Field(default_factory=lambda: OptimArgs.model_validate({}))
    sample: SampleArgs = Field(default_factory=lambda: SampleArgs.model_validate({}))
    hooks: HooksArgs = Field(default_factory=lambda: HooksArgs.model_validate({}))
    export: ExportArgs = Field(default_factory=lambda: ExportArgs.model_validate({}))
    runtime: RuntimeArgs = Field(default_factory=lambda: RuntimeArgs.model_validate({}))

    @model_validator(mode="after")
    def _masks_are_on(self) -> TrainArgs:
        given = self.objective
        for option, value in (
            ("mask_floor", given.mask_floor),
            ("mask_prior", given.mask_prior),
            ("attention.weight", given.attention.weight),
        ):
            if value and not self.data.masks:
                raise ValueError(
                    f"objective.{option} is {value:g}, but data.masks is off: there is nothing outside a mask; turn "
                    f"data.masks on, or leave {option} out"
                )
        if self.objective.mask_prior and self.objective.mask_floor == 1:
            raise ValueError(
                "objective.mask_floor is 1, which learns all of a picture alike, but objective.mask_prior keeps what "
                "is outside its mask; lower mask_floor, or leave mask_prior out"
            )
        return self

    @model_validator(mode="after")
    def _rules_have_another_device(self) -> TrainArgs:
        there = [rule.match for rule in self.optim.rules if rule.device == self.runtime.device]
        if there:
            raise ValueError(
                f"optim.rules: {there[0]!r} has device {self.runtime.device}, which is that of the run "
                "(runtime.device), so nothing would move; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _something_trains(self) -> TrainArgs:
        if self.adapter.kind == "none" and self.text.tokens == 0:
            raise ValueError("nothing would be trained: adapter.kind is none and text.tokens is 0; set one of them")
        data, concepts = self.data, self.data.concepts.values()
        words = bool(self.text.init_words) or (bool(concepts) and all(concept.init_words for concept in concepts))
        if self.text.init == "words" and self.text.tokens and not words:
            raise ValueError("text.init is words, but text.init_words is empty")
        classes = [data.of(folder).class_words for folder in data.concepts] or [data.class_words]
        if self.objective.prior_weight and not all(classes):
            raise ValueError(
                f"objective.prior_weight is {self.objective.prior_weight:g}, but data.class_words names no word that "
                "stands in for the trigger; give the concept's class (dog, person), or a prior_weight of 0"
            )
        return self

    @model_validator(mode="after")
    def _exports_hold_it(self) -> TrainArgs:
        known = self.adapter.kind in ADAPTER_KINDS
        self.export.check(
            layers=self.adapter.kind != "none",
            rows=self.text.tokens > 0,
            dora=self.adapter.kind == "dora" or (not known and self.adapter.kind != "none"),
        )
        return self

    @model_validator(mode="after")
    def _nothing_needs_whole_weights(self) -> TrainArgs:
        """Quantised weights are neither changed nor written."""
        if self.model.quantise == "none":
            return self
        adapter, whole = self.adapter, [layout for layout in self.export.layouts if layout in OF_WHOLE_MODELS]
        if adapter.kind == "full" and (adapter.targets != "norm" or adapter.match):
            raise ValueError(
                f"adapter.kind is full, which trains weights whole, but model.quantise is {self.model.quantise}, which "
                "rounds them; take another kind, adapter.targets norm, or quantise none"
            )
        if whole:
            raise ValueError(
                f"export.layouts has {', '.join(whole)}, but model.quantise is {self.model.quantise}, and no whole "
                "model is made of rounded weights; export kohya and merge that into the base with python -m "
                "trainer.tools merge, or take quantise none"
            )
        return self
