"""Sections of preprocessing: what a source may be and cost, and how its pictures are enlarged and varied."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainer.args.section import Section


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
