"""The section `model`: the base."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainer.args.section import Section


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
    quantise: Literal["none", "int8"] = Field(
        "none",
        description="hold the denoiser's frozen Linear weights as 8-bit integers, with a scale for each row: less "
        "memory, and weights off by up to 1/254 of the largest of their row",
    )
    prediction: Literal["auto", "epsilon", "v_prediction", "sample"] = Field(
        "auto", description="what the base predicts; auto reads the scheduler's config"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute the denoiser's layers again in the backward pass: less memory, more time"
    )
    attention: Literal["auto", "sdpa", "xformers"] = Field(
        "auto",
        description="what computes attention: torch (sdpa), or xformers, which needs a GPU and is tried out first; "
        "auto is torch, and on a CPU with bf16 two plain products, which are faster there",
    )
    packed: Literal["auto", "on", "off"] = Field(
        "auto",
        description="order the denoiser's frozen weights once for the CPU, which large models gain by, for memory of "
        "two more copies of them; auto: from 200 million weights on, where they all fit into half of the memory",
    )

    compile: Literal["none", "blocks"] = Field(
        "none",
        description="have torch compile the denoiser's transformer blocks, each kind once: faster steps, above all on "
        "a GPU, for a minute or more at the start; what was compiled is kept in torch's own cache",
    )

    @model_validator(mode="after")
    def _packed_alone(self) -> ModelArgs:
        if self.quantise != "none" and self.packed == "on":
            raise ValueError(
                f"packed is on, which holds two more copies of the weights, but quantise is {self.quantise}, which "
                "saves their memory; take packed auto or off, or quantise none"
            )
        if self.compile != "none" and self.packed == "on":
            raise ValueError(
                f"packed is on, and compile is {self.compile}, but torch cannot compile layers that are packed; take "
                "packed auto or off, or compile none"
            )
        return self

    @property
    def packing(self) -> Literal["auto", "on", "off"]:
        """What of `packed` is in force: weights that are quantised, or in blocks to be compiled, are not packed."""
        return self.packed if (self.quantise, self.compile) == ("none", "none") else "off"
