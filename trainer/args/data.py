"""The section `data`: pictures, captions, concepts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from trainer.args.captions import CaptionModelArgs, TriggerModelArgs
from trainer.args.masks import MaskArgs
from trainer.args.section import Probability, Section
from trainer.args.sources import AugmentArgs, HubArgs, LimitsArgs, UpscaleArgs

KEEP_SIDES = ("text", "letter", "letters", "lettering", "word", "words", "written", "writing", "sign", "logo", "number")


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
        return given.split(",") if isinstance(given, str) else [given] if isinstance(given, int | float) else given

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
