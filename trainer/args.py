"""The typed args tree: every option of a run with its type, default, unit and bound.

Nothing here touches torch, the disk, the clock or the environment. The tree is frozen;
values left at `None` are derived by `trainer.run.resolve` and saved resolved in args.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from trainer.registry import nearest

Probability = float


KEEP_SIDES = ("text", "letter", "letters", "lettering", "word", "words", "written", "writing", "sign", "logo", "number")


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class LimitsArgs(Section):
    """What a source may cost at most, so that a hostile one costs little."""

    entries: int = Field(10_000, ge=1, description="files in one archive or folder")
    file_bytes: int = Field(256 * 2**20, ge=1, description="bytes; one file, unpacked")
    total_bytes: int = Field(4 * 2**30, ge=1, description="bytes; one archive, unpacked, or one download")
    ratio: int = Field(200, ge=1, description="unpacked : packed, above 1 MiB; text and flat pictures stay below")
    pixels: int = Field(80_000_000, ge=1, description="one picture, before it is decoded")
    side: int = Field(16, ge=1, description="pixels; the shortest side worth training on")
    caption_bytes: int = Field(20_000, ge=1, description="bytes; one caption file")
    sources: int = Field(100, ge=1, description="sources in one list")
    redirects: int = Field(5, ge=0, description="times that a URL may lead to another")
    tries: int = Field(4, ge=1, description="requests of a URL whose server is busy or breaks off")
    wait_s: float = Field(30.0, gt=0, description="seconds that a server may keep silent")
    download_s: float = Field(3600.0, gt=0, description="seconds; one download from first to last byte")
    slowest: int = Field(1000, ge=0, description="bytes a second; a download slower than this on average is given up")


class HubArgs(Section):
    """What is read of a data set on the Hugging Face hub. Its token is never here: the hub client knows HF_TOKEN."""

    subset: str | None = Field(None, description="the data set's configuration, where it has several")
    split: str = Field("train", min_length=1, description="which of its splits")
    revision: str | None = Field(None, description="commit, branch or tag of the data set [default: its newest]")
    image: str | None = Field(None, description="column of the pictures [default: the only one]")
    caption: str | None = Field(
        None, description="column of the captions [default: text, caption, captions, prompt, txt or json]"
    )
    take: int | None = Field(None, ge=1, description="rows, from the first [default: all]")
    streaming: bool = Field(
        False, description="read rows as they come, and download no more of them; else all is kept in the hub's cache"
    )


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


class DetectArgs(Section):
    """The mask source detect: boxes of an object detector of transformers (YOLOS, DETR and their like)."""

    base: str | None = Field(None, description="folder or hub id of the detector, which detect needs")
    revision: str | None = Field(None, description="commit or tag, which base needs where it is a hub id")
    labels: tuple[str, ...] = Field((), description="labels of the detector that count (face); detect needs one")
    threshold: float = Field(0.5, gt=0.0, lt=1.0, description="how sure the model must be of a box")
    shape: Literal["ellipse", "box"] = Field("ellipse", description="what is masked: the box, or the ellipse in it")
    grow: float = Field(1.2, ge=0.5, le=4.0, description="times; sides of the mask in sides of the model's box")


class PersonArgs(Section):
    """The mask source person: pixels that a segmentation model of transformers (SegFormer, Mask2Former) names so."""

    base: str | None = Field(None, description="folder or hub id of the segmentation model, which person needs")
    revision: str | None = Field(None, description="commit or tag, which base needs where it is a hub id")
    labels: tuple[str, ...] = Field(("person",), min_length=1, description="which of the model's labels count")


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


class MaskArgs(Section):
    """Where masks come from, once data.masks is on."""

    sources: tuple[str, ...] = Field(
        ("sidecar", "folder", "alpha"),
        min_length=1,
        description="where masks come from, the first hit counts: sidecar (x.mask.png), folder (x.png in a folder "
        "masks), alpha (what the picture does not hide), a name of preprocess.maskers (face, detect, person, "
        "foreground, text), module:attr or file.py:attr",
    )
    feather: float = Field(
        0.0, ge=0.0, le=0.5, description="share of a picture's shorter side over which a mask's edge fades"
    )
    invert: bool = Field(False, description="let what the sources found count least, as for a scene without its people")
    detect: DetectArgs = Field(default_factory=lambda: DetectArgs.model_validate({}), description="source detect")
    person: PersonArgs = Field(default_factory=lambda: PersonArgs.model_validate({}), description="source person")
    text: str | None = Field(None, min_length=1, description="what the source text looks for: a red hat")
    threshold: float = Field(0.4, gt=0.0, lt=1.0, description="how sure the source text must be of a pixel")
    base: str | None = Field(None, description="folder or hub id of the CLIPSeg model of the source text")
    revision: str | None = Field(
        None, description="commit or tag of base, needed where that is a hub id: else masks could not be repeated"
    )
    batch_size: int = Field(4, ge=1, le=1024, description="pictures that a masker is shown at once")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where it runs; auto takes a GPU")

    @field_validator("sources")
    @classmethod
    def _one_each(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        """A flag may name several with commas between them, as the help shows them."""
        return tuple(name.strip() for names in sources for name in names.split(","))

    @model_validator(mode="after")
    def _text_is_whole(self) -> MaskArgs:
        if "text" in self.sources and (self.text is None or self.base is None):
            raise ValueError("sources names text, which needs text (what to look for) and base (a CLIPSeg model)")
        if self.text is not None and "text" not in self.sources:
            raise ValueError(f"text is {self.text!r}, but sources does not name text; add it, or leave text out")
        return self

    @model_validator(mode="after")
    def _models_are_named(self) -> MaskArgs:
        """A source that needs a model has one, and a model has its source."""
        if "detect" in self.sources and (self.detect.base is None or not self.detect.labels):
            raise ValueError("sources names detect, which needs detect.base (a detector) and detect.labels (of it)")
        if "person" in self.sources and self.person.base is None:
            raise ValueError("sources names person, which needs person.base (a segmentation model)")
        for name, section in (("detect", self.detect), ("person", self.person)):
            if name not in self.sources and section != type(section).model_validate({}):
                raise ValueError(f"{name} is given, but sources does not name {name}; add it, or leave {name} out")
        return self


class UpscaleArgs(Section):
    """What enlarges pictures that are much too small, in place of plain interpolation."""

    by: str = Field(
        "off",
        description="what enlarges pictures beyond data.upscale_limit: off, a name of preprocess.upscalers (swin2sr), "
        "module:attr or file.py:attr",
    )
    base: str | None = Field(None, description="folder or hub id of the Swin2SR model, which swin2sr needs")
    revision: str | None = Field(None, description="commit or tag, which base needs where it is a hub id")
    tile: int = Field(256, ge=32, le=4096, description="pixels; side of what the model sees at once")
    overlap: int = Field(32, ge=0, le=1024, description="pixels that neighbouring tiles share; 0 may show their edges")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where it runs; auto takes a GPU")

    @model_validator(mode="after")
    def _whole(self) -> UpscaleArgs:
        if self.by == "off" and self != UpscaleArgs.model_construct():
            raise ValueError("upscale is given, but upscale.by is off; set it to swin2sr, or leave the rest out")
        if self.by == "swin2sr" and self.base is None:
            raise ValueError("upscale.by is swin2sr, which needs upscale.base (a Swin2SR model)")
        if 2 * self.overlap > self.tile:
            raise ValueError(f"upscale.overlap is {self.overlap}, more than half of upscale.tile ({self.tile})")
        return self


Mode = Literal["prefix", "object", "face", "style"]


class ConceptArgs(Section):
    """One of several concepts; what it leaves out is as in the data section. A bare word is its trigger."""

    trigger: str = Field(min_length=1, description="word in captions and prompts that stands for this concept")
    class_words: tuple[str, ...] | None = Field(None, description="what it is or is like [default: data.class_words]")
    mode: Mode | None = Field(None, description="where a caption that lacks the trigger gets it [default: data.mode]")
    keep_class: bool | None = Field(None, description="the trigger before the class word [default: data.keep_class]")
    caption: str | None = Field(None, description="for its pictures without one [default: data.caption]")
    prefix: str | None = Field(None, description="put before every caption [default: data.prefix]")
    suffix: str | None = Field(None, description="put after every caption [default: data.suffix]")
    init_words: str | None = Field(
        None, description="words whose mean row starts its vectors [default: text.init_words]"
    )

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: object) -> object:
        return {"trigger": given} if isinstance(given, str) else given


class AugmentArgs(Section):
    """More versions of each picture. They are made once and cached; which one a showing takes is drawn by its index."""

    variants: int = Field(0, ge=0, le=100, description="versions of each picture, beside the plain one")
    colour: float = Field(
        0.0, ge=0.0, le=0.5, description="share by which brightness, contrast and saturation differ in them at most"
    )
    crop: float = Field(
        0.0, ge=0.0, le=0.2, description="share of the crop by which it is made smaller and moved in them at most"
    )

    @model_validator(mode="after")
    def _differ(self) -> AugmentArgs:
        """Options that would do nothing are mistakes."""
        if self.variants and not (self.colour or self.crop):
            raise ValueError(
                f"variants is {self.variants}, but colour and crop are 0: all versions would be the plain picture"
            )
        if (self.colour or self.crop) and not self.variants:
            raise ValueError("colour and crop are for the versions of a picture, but variants is 0; give a few, say 4")
        return self


class RegularisationArgs(Section):
    """Ordinary pictures of the concepts' kinds, shown in turn with the concepts' own so that the kinds stay as they are
    (the class pictures of DreamBooth, arXiv 2208.12242). No trigger is put into their captions."""

    source: str | None = Field(None, description="where they are, as data.source [default: there are none]")
    caption: str | None = Field(
        None, description="caption for those that come without one: their kind (a photo of a dog); no trigger"
    )
    ratio: float = Field(
        1.0, gt=0.0, le=100.0, description="showings of these pictures for each showing of a concept's picture"
    )
    weight: float = Field(1.0, ge=0.0, le=100.0, description="factor of their loss")

    @model_validator(mode="after")
    def _has_source(self) -> RegularisationArgs:
        given = sorted(self.model_fields_set - {"source"})
        changed = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
        if self.source is None and changed:
            raise ValueError(f"{', '.join(changed)} would do nothing, because source names no pictures")
        return self

    def showings(self, pictures: int) -> int:
        """Of an epoch of so many pictures of concepts, with those of these pictures that go with them."""
        return pictures + (round(self.ratio * pictures) if self.source is not None else 0)


class DataArgs(Section):
    source: str = Field(
        description="folder, picture, .zip, .tar(.gz, .bz2, .xz, .zst), http(s) URL of one, hf://datasets/owner/name "
        "of the Hugging Face hub, or several with | between them or as a JSON list; x.txt beside x.png is its caption"
    )
    hub: HubArgs = Field(
        default_factory=lambda: HubArgs.model_validate({}), description="which part of a data set on the hub is read"
    )
    private_urls: bool = Field(False, description="let a URL lead to addresses inside private networks")
    limits: LimitsArgs = Field(
        default_factory=lambda: LimitsArgs.model_validate({}), description="what a source may cost at most"
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="processes that decode and look at pictures, once there is work for several seconds; 0 and 1 do it "
        "in the trainer's own [default: one for each core that it may use]",
    )
    trigger: str = Field("TOK", min_length=1, description="word in captions and prompts that stands for the concept")
    concepts: dict[str, ConceptArgs] = Field(
        default_factory=dict[str, ConceptArgs],
        description="several concepts at once, each with its own trigger, as folder=trigger, or as JSON with more of "
        'its options ({"dog": {"trigger": "TOK", "class_words": ["dog"]}}); . is the top folder, and pictures of '
        "folders that are not named have data.trigger",
    )
    regularisation: RegularisationArgs = Field(
        default_factory=lambda: RegularisationArgs.model_validate({}), description="ordinary pictures of their kinds"
    )
    caption: str | None = Field(
        None,
        description="caption for pictures that come without one; {trigger} stands for the trigger, and it is put "
        "first where a caption lacks it [default: a {trigger}; in mode style: a picture in the style of {trigger}]",
    )
    captioner: str = Field(
        "sidecar",
        description="captions for pictures that come without one: a name of preprocess.captioners, or module:attr; "
        "sidecar leaves them to data.caption, none does so with all pictures",
    )
    recaption: bool = Field(False, description="let the captioner write captions for all pictures")
    caption_model: CaptionModelArgs = Field(
        default_factory=lambda: CaptionModelArgs.model_validate({}), description="the captioner's model"
    )
    caption_lines: bool = Field(
        False, description="take each line of x.txt for a caption of its own; training draws one of them each time"
    )
    embedded_captions: bool = Field(
        False, description="read captions from EXIF and PNG text where no file has one; editors and cameras write it"
    )
    mode: Mode = Field(
        "prefix",
        description="where a caption that lacks the trigger gets it: first; for object and face instead of the first "
        "class word that it names; for style in the style of it, at the end",
    )
    rewrite: Literal["rules", "model"] = Field(
        "rules",
        description="who puts the trigger where the mode wants it: rules, or a chat model whose answers are checked, "
        "with the rules for what fails",
    )
    trigger_model: TriggerModelArgs = Field(
        default_factory=lambda: TriggerModelArgs.model_validate({}), description="the model of data.rewrite model"
    )
    keep_class: bool = Field(False, description="write the trigger before the class word, not instead of it")
    prefix: str = Field("", description="put before every caption; {trigger} stands for the trigger")
    suffix: str = Field("", description="put after every caption; {trigger} stands for the trigger")
    resolution: tuple[Annotated[int, Field(ge=16, le=4096)], ...] = Field(
        (),
        description="pixels; side of the square whose area every bucket keeps, or several (512,768,1024): each picture "
        "trains at the largest that it fills without being enlarged, else at the smallest [default: the base's own]",
    )
    upscale_limit: float = Field(
        2.0, ge=1.0, le=100.0, description="times; pictures enlarged more than this are named in a warning"
    )
    upscale: UpscaleArgs = Field(
        default_factory=lambda: UpscaleArgs.model_validate({}), description="what enlarges pictures beyond that"
    )
    crop: Literal["center", "mask"] = Field(
        "center", description="what a bucket keeps of a picture: its middle, or as far as possible its mask's"
    )
    dedupe: Literal["off", "exact", "near"] = Field(
        "exact", description="leave out copies: exact to the pixel, or near ones too (resized, saved again, retouched)"
    )
    dedupe_bits: int = Field(
        6, ge=0, le=20, description="bits of 64 in which the perceptual hashes of near copies may differ"
    )
    class_words: tuple[str, ...] = Field(
        (),
        description="what the concept is or is like (dog, cat): stand in for the trigger where the prior is kept, and "
        "the trigger for them in modes object and face [default for face: person, woman, man and the like]",
    )
    flip: bool = Field(False, description="mirror pictures at random (off: many subjects are not symmetric)")
    keep_sides: tuple[str, ...] = Field(
        KEEP_SIDES,
        description="words: pictures with one of them in a caption are never mirrored, as writing would be, too",
    )
    augment: AugmentArgs = Field(
        default_factory=lambda: AugmentArgs.model_validate({}), description="more versions of each picture"
    )
    caption_dropout: Probability = Field(
        0.05, ge=0.0, le=1.0, description="share of captions replaced by the empty one, which guidance relies on"
    )
    masks: bool = Field(False, description="weight the loss by a mask (white: learn) where a picture has one")
    mask: MaskArgs = Field(default_factory=lambda: MaskArgs.model_validate({}), description="where masks come from")

    stages: dict[str, str] = Field(
        default_factory=dict[str, str],
        description="own stages of preprocessing, as place=module:attr or place=file.py:attr; a place is a stage's "
        "name (dedupe, regular, caption, trigger, mask, upscale, bucket), whose place it takes, or before or after one",
    )
    repeats: dict[str, Annotated[int, Field(ge=1, le=1000)]] = Field(
        default_factory=dict[str, int],
        description="times that each picture of a folder is shown in an epoch, as folder=times; . is the top folder, "
        "and others count once",
    )
    balance: bool = Field(False, description="show every folder as often as the largest, by repeating its pictures")
    weights: dict[str, Annotated[float, Field(ge=0.0, le=100.0)]] = Field(
        default_factory=dict[str, float],
        description="factor of the loss of a folder's pictures, as folder=factor; . is the top folder, and others "
        "have 1",
    )
    shuffle_tags: bool = Field(False, description="put what commas part in a caption in another order at each showing")
    keep_tags: int = Field(
        1, ge=0, description="first parts of a caption that shuffle_tags leaves in their place, and tag_dropout there"
    )
    tag_dropout: Probability = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of what commas part in a caption that is left out at each showing; never the first "
        "keep_tags, and never one that names the trigger",
    )
    caption_variants: int = Field(
        0,
        ge=0,
        le=1000,
        description="forms of a caption that shuffle_tags and tag_dropout draw from, so that each is encoded once; 0 "
        "makes a new one at each showing, and encodes it then",
    )
    sheet: int = Field(500, ge=0, description="pictures on the contact sheet, those with a warning first; 0 makes none")

    @field_validator("resolution", mode="before")
    @classmethod
    def _as_people_write_it(cls, given: object) -> object:
        """512, "512", "512,768" and [512, 768] are all sides; null is none."""
        if given is None:
            return ()
        return given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given

    @field_serializer("resolution")
    def _as_people_read_it(self, sides: tuple[int, ...]) -> int | list[int] | None:
        """A number where there is one side, a list where there are several."""
        return (sides[0] if len(sides) == 1 else list(sides)) if sides else None

    @model_validator(mode="after")
    def _captions_fit(self) -> DataArgs:
        """Options that would do nothing are mistakes."""
        unseeing = self.captioner in ("sidecar", "none", "filename")
        if unseeing and self.caption_model != CaptionModelArgs.model_validate({}):
            raise ValueError(f"data.caption_model is given, but data.captioner {self.captioner} uses no model")
        if self.rewrite == "rules" and self.trigger_model != TriggerModelArgs.model_validate({}):
            raise ValueError("data.trigger_model is given, but data.rewrite is rules, which use no model")
        if self.recaption and self.captioner in ("sidecar", "none"):
            raise ValueError(f"data.recaption is on, but data.captioner {self.captioner} writes no captions")
        if (self.caption_lines or self.embedded_captions) and (self.recaption or self.captioner == "none"):
            raise ValueError(
                "data.caption_lines and data.embedded_captions say how captions are read, but data.recaption or "
                "captioner none leaves them unread"
            )
        if self.caption_variants and not self.varied:
            raise ValueError(
                f"data.caption_variants is {self.caption_variants}, but data.shuffle_tags and data.tag_dropout are "
                "off: all of them would be the caption as it is"
            )
        return self

    @model_validator(mode="after")
    def _triggers_fit(self) -> DataArgs:
        """Of pictures outside the concepts it is known later whether there are any."""
        _check_mode("data", self, words_needed=not self.concepts)
        for folder in self.concepts:
            _check_mode(f"data.concepts.{folder}", self.of(folder))
        return self

    def of(self, folder: str) -> DataArgs:
        """The section as it holds for the pictures of a folder: with its concept's options, and with no concepts."""
        own = self.concepts[folder].model_dump(exclude_none=True) if folder in self.concepts else {}
        own.pop("init_words", None)
        return self.model_copy(update={"concepts": {}, **own})

    @property
    def triggers(self) -> tuple[str, ...]:
        """All triggers, the first concept's first; those of pictures outside the concepts once that is resolved."""
        return tuple(dict.fromkeys(concept.trigger for concept in self.concepts.values())) or (self.trigger,)

    @property
    def varied(self) -> bool:
        """Whether a caption is hardly ever the same at two showings."""
        return self.shuffle_tags or self.tag_dropout > 0

    @property
    def own_caption(self) -> str:
        """What a picture is captioned with that comes without a caption."""
        default = "a picture in the style of {trigger}" if self.mode == "style" else "a {trigger}"
        return (default if self.caption is None else self.caption).replace("{trigger}", self.trigger)

    @model_validator(mode="after")
    def _sides_fit(self) -> DataArgs:
        if self.flip and "face" in (self.mode, *(concept.mode for concept in self.concepts.values())):
            raise ValueError(
                "data.flip is on, but data.mode is face: no face is symmetric, and mirrored pictures teach another "
                "person's; turn data.flip off"
            )
        if self.keep_sides != KEEP_SIDES and not self.flip:
            raise ValueError("data.keep_sides says what is not mirrored, but data.flip is off: nothing is mirrored")
        if any(not word.strip() for word in self.keep_sides):
            raise ValueError("data.keep_sides has an empty word, which would be in every caption; leave it out")
        return self

    @model_validator(mode="after")
    def _masks_are_on(self) -> DataArgs:
        needing = (
            ("data.crop mask", self.crop == "mask"),
            ("data.mask.text", self.mask.text is not None),
            ("data.mask.invert", self.mask.invert),
        )
        for option, given in needing:
            if given and not self.masks:
                raise ValueError(f"{option} needs masks, but data.masks is off; turn it on, or leave {option} out")
        return self


def _check_mode(where: str, data: DataArgs, *, words_needed: bool = True) -> None:
    if data.mode == "object" and not data.class_words and words_needed:
        raise ValueError(
            f"{where}.mode is object, but {where}.class_words names no word that the trigger stands in for"
        )
    if data.keep_class and data.mode not in ("object", "face"):
        raise ValueError(f"{where}.keep_class is for modes object and face, and the mode is {data.mode}")


class ModelArgs(Section):
    family: str = Field(
        "auto", description="model family: auto (told by the base), a name of trainer.models, or module:attr"
    )
    base: str = Field(
        "testbed/base", description="diffusers folder, hub id, or single-file .safetensors checkpoint to train on"
    )
    revision: str | None = Field(None, description="commit or tag of a hub id")
    config: str | None = Field(
        None,
        description="diffusers folder or hub id whose configs and tokenizer a single-file base is read with "
        "[default: what diffusers finds on the hub]",
    )
    merge: dict[str, float] = Field(
        default_factory=dict[str, float],
        description="file=strength: LoRAs and other updates (files or run directories) merged into the base first",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="precision of the frozen weights")
    prediction: Literal["auto", "epsilon", "v_prediction", "sample"] = Field(
        "auto", description="what the base predicts; auto reads the scheduler's config"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute the denoiser's layers again in the backward pass: less memory, more time"
    )
    attention: Literal["sdpa", "xformers"] = Field(
        "sdpa", description="what computes attention: torch, or xformers, which needs a GPU and is tried out first"
    )


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
    "axis": ("dora",),
    "factor": ("lokr",),
    "block": ("oft",),
    "bias": ("full",),
    "max_norm": ("lora", "loha", "lokr", "full"),
    "start": ("lora", "dora", "loha", "lokr", "full"),
}
_ADAPTER_KINDS = ("lora", "dora", "loha", "lokr", "oft", "full")


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
        "attention",
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
        None, description="file or run directory whose adapter of the same kind and ranks is trained on [default: none]"
    )
    text: EncodersArgs = Field(
        default_factory=lambda: EncodersArgs.model_validate({}), description="the same on the text encoders"
    )

    @field_validator("match", "exclude")
    @classmethod
    def _are_regexes(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            _check_regex(pattern)
        return patterns

    @field_validator("ranks", "alphas")
    @classmethod
    def _have_regexes(cls, values: dict[str, float]) -> dict[str, float]:
        for pattern in values:
            _check_regex(pattern)
        return values

    @model_validator(mode="after")
    def _fits_the_kind(self) -> AdapterArgs:
        """Options that would do nothing are mistakes. What an adapter from elsewhere reads is not known."""
        if self.kind in _ADAPTER_KINDS:
            default = AdapterArgs.model_construct()
            for option, kinds in _ADAPTER_OPTIONS.items():
                if self.kind not in kinds and getattr(self, option) != getattr(default, option):
                    raise ValueError(
                        f"adapter.{option} is {getattr(self, option)}, which does nothing for adapter.kind {self.kind} "
                        f"(it is for {', '.join(kinds)}); leave it out"
                    )
        if self.match and self.targets != "attention":
            raise ValueError(f"adapter.match is given, and so is adapter.targets ({self.targets}); choose one of them")
        if self.kind == "none" and self.text.train:
            raise ValueError("adapter.text.train is on, but adapter.kind is none; choose the kind, or turn it off")
        return self

    @property
    def scaled_by_alpha(self) -> bool:
        """Whether alpha means something, and has a default."""
        return self.kind not in _ADAPTER_KINDS or self.kind in _ADAPTER_OPTIONS["alpha"]

    def for_text(self) -> AdapterArgs:
        """The section as it holds for the text encoders."""
        own = self.text
        rank = own.rank or self.rank
        alpha = own.alpha or (float(rank) if own.rank and self.scaled_by_alpha else self.alpha)
        changes = {"targets": own.targets, "match": own.match, "exclude": own.exclude, "rank": rank, "alpha": alpha}
        return self.model_copy(update={**changes, "ranks": {}, "alphas": {}})


def _check_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


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
        _only_with(self, "density", {**users, "scale": ("mode",)})
        _only_with(self, "shift_by", {"shift": ("none",), "shift_base": ("sd3",)})
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
        _only_with(self, "kind", {"p2_k": ("p2",), "p2_gamma": ("p2",), "sigma_data": ("edm",)})
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
        _only_with(self, "kind", {"delta": ("huber", "smooth_l1"), "schedule": ("huber", "smooth_l1")})
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


def _only_with(section: Section, switch: str, users: Mapping[str, tuple[str, ...]]) -> None:
    """ValueError where an option differs from its default and the section's `switch` has no value that uses it."""
    value = getattr(section, switch)
    for option, by in users.items():
        if getattr(section, option) != type(section).model_fields[option].default and value not in by:
            raise ValueError(f"{option} is given, but {switch} is {value}, which ignores it; take {' or '.join(by)}")


CURVES = ("constant", "linear", "cosine", "restarts", "polynomial", "exponential", "rex")
PIVOTS = ("adaptive", "pivot_rows", "pivot_adapter", "hard_pivot")


class CurveArgs(Section):
    """A learning rate over progress."""

    curve: str = Field(
        "constant",
        description="learning rate over progress: constant, linear, cosine, restarts (cycles cosines), polynomial "
        "(power), exponential, rex; adaptive: rows fall while the adapter rises (its halves: pivot_rows, "
        "pivot_adapter); hard_pivot: rows until optim.pivot, then the adapter; or module:attr, file.py:attr",
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
        """A curve is there, and options that would do nothing are mistakes."""
        if ":" not in self.curve and self.curve not in (*CURVES, *PIVOTS, *self._no_curve()):
            meant = nearest(self.curve, (*CURVES, *PIVOTS))
            hint = f"; did you mean {meant}?" if meant else ""
            allowed = ", ".join((*CURVES, *PIVOTS))
            raise ValueError(f"curve {self.curve!r} is unknown{hint} (allowed: {allowed}, module:attr or file.py:attr)")
        if 0.9 < self.warmup < 1 or (self.warmup > 1 and self.warmup % 1):
            raise ValueError(f"warmup is {self.warmup:g}: give whole updates, or a share of the run up to 0.9")
        falls = self.curve in ("linear", "cosine", "restarts", "polynomial", "exponential", "rex")
        needless = {
            "warmup": bool(self.warmup) and (":" in self.curve or self.curve in self._no_curve()),
            "ramp": self.ramp != "linear" and not (self.warmup and self.curve in (*CURVES, "hard_pivot")),
            "floor": bool(self.floor) and not falls,
            "cycles": self.cycles != 1 and self.curve != "restarts",
            "power": self.power != 1 and self.curve != "polynomial",
        }
        for option, is_so in needless.items():
            if is_so:
                raise ValueError(
                    f"{option} would do nothing for curve {self.curve or 'of the component'}; leave it out"
                )
        if self.curve == "exponential" and not self.floor:
            raise ValueError(
                "curve exponential falls by the same ratio at each update and never to 0; give floor, say 0.01"
            )
        return self

    def _no_curve(self) -> tuple[str, ...]:
        return ()


class ComponentOptim(CurveArgs):
    """Optimizer and learning-rate curve of one component (the denoiser's adapter, or the token rows)."""

    name: str = Field(
        "adamw",
        description="optimizer: one of torch's (adamw, adam, sgd, adafactor, muon ...), prodigy, which finds its own "
        "rate and takes lr 1, one of the extras (docs/optimizers.md), module:attr or file.py:attr",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
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

    @field_validator("options")
    @classmethod
    def _as_json(cls, options: dict[str, Any]) -> dict[str, Any]:
        """A flag gives text: what reads as JSON is a number, a truth value or a list."""
        return {name: _parsed(value) if isinstance(value, str) else value for name, value in options.items()}


class RowsOptim(ComponentOptim):
    """The same with the default of the token rows, which need larger steps."""

    lr: float = Field(1e-2, gt=0, description="peak learning rate")


class TextOptim(ComponentOptim):
    """The same with the default of the text encoders' layers, which need smaller steps."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate")


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
            raise ValueError(f"rule {self.match} changes nothing; give lr_scale, after, until, curve or dtype")
        if self.curve in PIVOTS:
            raise ValueError(f"rule {self.match}: {self.curve} is for components, not for single layers")
        return self

    def _no_curve(self) -> tuple[str, ...]:
        return ("",)


class OptimArgs(Section):
    adapter: ComponentOptim = Field(
        default_factory=lambda: ComponentOptim.model_validate({}), description="the adapter's"
    )
    rows: RowsOptim = Field(default_factory=lambda: RowsOptim.model_validate({}), description="the token rows'")
    text: TextOptim = Field(
        default_factory=lambda: TextOptim.model_validate({}), description="the adapter's on the text encoders"
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


class SwitchedArgs(Section):
    """A hook's options, of which some turn it on by being other than their default; without, the rest do nothing."""

    switches: ClassVar[tuple[str, ...]]

    @property
    def on(self) -> bool:
        return any(name in self._given() for name in self.switches)

    @model_validator(mode="after")
    def _used(self) -> Self:
        idle = [name for name in self._given() if name not in self.switches]
        if idle and not self.on:
            raise ValueError(f"{', '.join(idle)} does nothing unless {' or '.join(self.switches)} is set")
        return self

    def _given(self) -> list[str]:
        """The options that are not what they are by default."""
        fields = type(self).model_fields
        return [name for name, value in self if value != fields[name].default]


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
    collapse: CollapseArgs = Field(default_factory=lambda: CollapseArgs.model_validate({}))
    extra: tuple[str | HookUse, ...] = Field(
        (),
        description="more hooks: table names, module:attr or file.py:attr; with options as "
        '{"use": "file.py:attr", "options": {...}}',
    )


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

    def updates(self, pictures: int) -> int:
        """The steps of a run on so many pictures."""
        return self.steps or min(2000, max(300, 30 * pictures))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


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
    def _masks_are_on(self) -> TrainArgs:
        for option, value in (("mask_floor", self.objective.mask_floor), ("mask_prior", self.objective.mask_prior)):
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
    def _something_trains(self) -> TrainArgs:
        if self.adapter.kind == "none" and self.text.tokens == 0:
            raise ValueError("nothing would be trained: adapter.kind is none and text.tokens is 0; set one of them")
        if self.objective.prior_weight and self.adapter.text.train:
            raise ValueError(
                "objective.prior_weight keeps what class_words are drawn as before training, but adapter.text.train "
                "changes how they are read; turn one of them off"
            )
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
