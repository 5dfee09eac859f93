"""What callers of Cog's doors send besides options of the tree. `trainer.cog_inputs` says which options they may."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator

from trainer.args.section import Section
from trainer.schedulers import SCHEDULERS


class TrainingRequest(Section):
    """What a training is asked for, beside options."""

    input_images: Path | None = Field(
        None,
        description="zip or tar of 2 pictures or more, usually 5 to 30, or a JSON list of URLs; x.txt beside x.png is "
        "its caption",
    )
    concept_mode: Literal["object", "style", "face"] | None = Field(
        None, description="what is learned: the preset that all other inputs change; blank: object"
    )
    autocaption: bool | None = Field(
        None, description="have captions written for pictures that come without one; by florence2, or by captioner"
    )
    mask_target_prompts: str | None = Field(
        None,
        min_length=1,
        description="learn only what fits these words (a red hat), found by the CLIPSeg model that args names as "
        "data.mask.base",
    )
    resume_from: Path | None = Field(
        None,
        description="go on with a run that was cancelled or killed: a tar of it, or the name under which this server "
        "kept it; it has its pictures and options",
    )
    hf_repo_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$",
        description="owner/name on the Hugging Face Hub that the files are pushed to as well; needs hf_token",
    )
    hf_token: SecretStr | None = Field(None, description="token that may write to hf_repo_id; it is not kept")
    args: str | None = Field(
        None,
        description='any other options: JSON such as {"optim": {"max_grad_norm": 0.5}}, or the URL of a JSON file',
    )


@dataclass(frozen=True)
class Choices:
    """Values that a text input may have, where a table says them."""

    values: tuple[str, ...]


class DrawingRequest(Section):
    """What pictures are asked for. The bounds protect the server."""

    prompt: str = Field(max_length=4000, description="what to draw; it must name the trigger to show the concept")
    negative_prompt: str = Field("", max_length=4000, description="what the picture is guided away from")
    replicate_weights: Path | None = Field(
        None,
        description="what a training gave, or another LoRA or embedding: tar, zip or .safetensors; blank: the weights "
        "that the server was started with, if any",
    )
    lora_scale: float = Field(1.0, ge=-2.0, le=3.0, description="strength of the weights")
    extra_lora: str | list[str] | None = Field(None, description="more weights beside those: a URL, or a list of URLs")
    extra_lora_scale: float | list[float] | None = Field(
        None, description="-2 to 3: the strength of extra_lora, or of each of them; blank: 1"
    )
    image: Path | None = Field(None, description="picture to begin with")
    mask: Path | None = Field(None, description="of the picture: white is drawn anew, black stays")
    prompt_strength: float | None = Field(
        None, ge=0.01, le=1.0, description="how much of the picture is drawn anew; blank: 0.8, with a mask 1"
    )
    width: int | None = Field(None, ge=16, le=2048, description="pixels; blank: the picture's, or the base's own")
    height: int | None = Field(None, ge=16, le=2048, description="pixels; blank: the picture's, or the base's own")
    num_outputs: int = Field(1, ge=1, le=8, description="pictures, with the next seeds")
    scheduler: Annotated[str | None, Choices(tuple(SCHEDULERS))] = Field(
        None, description="what samples; blank: the base's own"
    )
    num_inference_steps: int = Field(25, ge=1, le=200, description="denoising steps")
    guidance_scale: float = Field(3.0, ge=0.0, le=30.0, description="classifier-free guidance")
    seed: int | None = Field(None, ge=0, lt=2**31, description="of the first picture; blank: any, which the log says")
    output_format: Literal["png", "webp", "jpg"] = Field("png", description="of the files")
    output_quality: int | None = Field(None, ge=1, le=100, description="of webp and jpg; blank: 90")

    @model_validator(mode="after")
    def _fits(self) -> DrawingRequest:
        """Inputs that would do nothing are mistakes."""
        extra = [self.extra_lora] if isinstance(self.extra_lora, str) else self.extra_lora or []
        scales = self.extra_lora_scale
        needless = {
            "mask is of a picture: give it as image": self.mask is not None and self.image is None,
            "prompt_strength does nothing without image": self.prompt_strength is not None and self.image is None,
            "output_quality is for webp and jpg, and output_format is png; leave it out": (
                self.output_quality is not None and self.output_format == "png"
            ),
            "extra_lora_scale does nothing without extra_lora": scales is not None and not extra,
            f"extra_lora names {len(extra)}, and extra_lora_scale has another number; give one for each": (
                isinstance(scales, list) and bool(extra) and len(scales) != len(extra)
            ),
            "extra_lora_scale must be from -2 to 3": any(not -2 <= scale <= 3 for scale in self._scales()),
            f"extra_lora names {len(extra)}, and 4 are allowed": len(extra) > 4,
            "guidance_scale of 1 or less guides nowhere, so negative_prompt would do nothing": (
                self.guidance_scale <= 1 and bool(self.negative_prompt)
            ),
        }
        for said, wrong in needless.items():
            if wrong:
                raise ValueError(said)
        return self

    def extras(self) -> list[tuple[str, float]]:
        """(URL, strength) of each of the further weights."""
        urls = [self.extra_lora] if isinstance(self.extra_lora, str) else self.extra_lora or []
        return list(zip(urls, self._scales() or [1.0] * len(urls), strict=False))

    def _scales(self) -> list[float]:
        given = self.extra_lora_scale
        if isinstance(given, int | float):
            return [given] * (len(self.extra_lora) if isinstance(self.extra_lora, list) else 1)
        return given or []
