"""Sections of preprocessing: where masks come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from trainer.args.section import Section


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
