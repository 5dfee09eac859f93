"""Sections of preprocessing: the models that write captions and put triggers into them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.args.section import Probability, Section


class CaptionModelArgs(Section):
    """The model of a captioner, which looks at pictures. It is loaded for its stage only, and freed after it."""

    base: str | None = Field(
        None,
        description="folder or hub id of the captioner's model [default: the captioner's own, at a pinned revision]",
    )
    revision: str | None = Field(
        None, description="commit or tag of base, needed where that is a hub id: else captions could not be repeated"
    )
    vocabulary: str | None = Field(
        None, description="JSON file of the phrases that clip picks from [default: vocabulary.json beside its model]"
    )
    prompt: str | None = Field(
        None,
        description="what the model is asked: for blip the words that a caption starts with, for florence2 a task "
        "[default: <DETAILED_CAPTION>], for qwen-vl and joycaption a style (descriptive, short, tags) or a question "
        "of your own [default: descriptive]",
    )
    batch_size: int = Field(8, ge=1, le=1024, description="pictures captioned at once")
    side: int = Field(512, ge=16, le=4096, description="pixels; pictures are shrunk to this before the model sees them")
    tokens: int = Field(75, ge=1, le=1024, description="tokens that a captioner which writes sentences uses at most")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="precision of the weights; auto is bf16 for qwen-vl and joycaption on a GPU, else fp32"
    )
    general_threshold: float = Field(0.35, gt=0.0, le=1.0, description="how sure wd-tagger must be of a tag")
    character_threshold: float = Field(
        0.85, gt=0.0, le=1.0, description="how sure wd-tagger must be of a tag that names a character"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where it runs; auto takes a GPU")


class TriggerModelArgs(Section):
    """The chat model of data.rewrite model. It is loaded for its stage only, and freed after it."""

    base: str | None = Field(
        None, description="folder or hub id of an instruct model [default: Qwen2.5-0.5B-Instruct at a pinned revision]"
    )
    revision: str | None = Field(
        None, description="commit or tag of base, needed where that is a hub id: else captions could not be repeated"
    )
    keeps: Probability = Field(
        0.7, ge=0.0, le=1.0, description="share of a caption's words that an answer must keep, in their order"
    )
    batch_size: int = Field(8, ge=1, le=1024, description="captions asked about at once")
    tokens: int = Field(160, ge=1, le=4096, description="tokens of an answer at most; a longer one is not used")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where it runs; auto takes a GPU")
