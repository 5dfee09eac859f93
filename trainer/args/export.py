"""The section `export`: which files a run leaves behind, and what they say about themselves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainer.args.section import Section

Layout = Literal["kohya", "diffusers", "comfy", "peft", "checkpoint", "checkpoint-folder", "embedding"]
OF_ROWS: tuple[Layout, ...] = ("embedding",)  # the layouts of token vectors; all others are of layers
OF_WHOLE_MODELS: tuple[Layout, ...] = ("checkpoint", "checkpoint-folder")


class ExportArgs(Section):
    layouts: tuple[Layout, ...] = Field(
        (),
        description="files to write: kohya (all programs), diffusers, comfy (the names of ComfyUI's own modules), peft "
        "(folders for PeftModel), checkpoint (the whole model, one file), checkpoint-folder (the whole model for "
        "diffusers), embedding (token vectors) [default: kohya for layers, embedding for token vectors]",
    )
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="precision of the exported tensors [default: model.dtype]"
    )
    dora: Literal["dora", "lora"] = Field(
        "dora",
        description="what DoRA is written as: itself, or the nearest LoRA (by SVD), for programs that know no DoRA; "
        "how near it is goes into the log and the README",
    )
    dora_rank: int | None = Field(
        None, ge=1, le=1024, description="rank of the nearest LoRA [default: each layer's own]"
    )
    metadata: Literal["full", "minimal", "none"] = Field(
        "full",
        description="what the files' headers say: all that programs show, with the words of captions and digests; only "
        "what programs need to tell what the file is; or nothing",
    )
    author: str | None = Field(None, min_length=1, max_length=200, description="author, in the headers")
    thumbnail: bool = Field(False, description="put a small sample picture into the headers")

    @model_validator(mode="after")
    def _used(self) -> ExportArgs:
        twice = sorted({layout for layout in self.layouts if self.layouts.count(layout) > 1})
        if twice:
            raise ValueError(f"layouts names {', '.join(twice)} twice")
        if self.dora_rank is not None and self.dora != "lora":
            raise ValueError(f"dora_rank is {self.dora_rank}, but dora is written as itself; set dora to lora")
        for option, given in (("author", self.author is not None), ("thumbnail", self.thumbnail)):
            if given and self.metadata != "full":
                raise ValueError(f"{option} is given, but metadata is {self.metadata}; take metadata full")
        return self

    def for_layers(self) -> tuple[Layout, ...]:
        """The layouts that hold what layers learned, by default kohya's."""
        return tuple(layout for layout in self.layouts or ("kohya",) if layout not in OF_ROWS)

    def check(self, *, layers: bool, rows: bool, dora: bool) -> None:
        """ValueError where a chosen layout would hold nothing, or what is trained is in none of them.

        Args:
            layers, rows, dora: whether layers are trained, token vectors are, and whether the kind may be DoRA.
        """
        if self.dora == "lora" and not dora:
            raise ValueError("export.dora is lora, but adapter.kind is not dora; leave it out")
        if not self.layouts:
            return
        of_rows = [layout for layout in self.layouts if layout in OF_ROWS]
        of_layers = self.for_layers()
        given = ", ".join(self.layouts)
        if of_rows and not rows:
            raise ValueError("export.layouts has embedding, but text.tokens is 0; there are no token vectors to write")
        if of_layers and not layers:
            raise ValueError(f"export.layouts has {', '.join(of_layers)}, but adapter.kind is none; take embedding")
        if rows and not of_rows:
            raise ValueError(f"export.layouts is {given}, which holds no token vectors (text.tokens); add embedding")
        if layers and not of_layers:
            raise ValueError(f"export.layouts is {given}, which holds no layers (adapter.kind); add kohya")
