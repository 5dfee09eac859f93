"""The Stable Diffusion 1.5 family: one CLIP text tower, a 4-channel VAE, a UNet with cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import CLIPTextModel

from trainer.models import original, spelling
from trainer.models.latent import LatentFamily
from trainer.models.parts import Parts
from trainer.types import BaseModelError, ClientNames, Cond, Task


class SD15(LatentFamily):
    """Frozen Stable Diffusion 1.5: loads itself, encodes, predicts."""

    name = "sd15"
    title = "Stable Diffusion 1.5"
    pipelines: ClassVar[Mapping[Task, str]] = {
        "text": "StableDiffusionPipeline",
        "image": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    }
    towers: ClassVar[Mapping[str, Any]] = {"text_encoder": CLIPTextModel}
    clients = ClientNames(
        base_version="sd_v1",
        architecture="stable-diffusion-v1",
        diffusers=spelling.diffusers,
        kohya=spelling.kohya({"denoiser": "lora_unet", "text_encoder": "lora_te"}),
        embeddings={"text_encoder": "emb_params"},
    )
    original_towers: ClassVar[Mapping[str, original.Tower]] = {
        "text_encoder": original.clip("cond_stage_model.transformer.")
    }

    def __init__(
        self, base: Parts, *, prediction: str = "auto", clip_folders: Mapping[str, Path] | None = None
    ) -> None:
        super().__init__(base, prediction=prediction, clip_folders=clip_folders)
        self.clients = self.named(self._unet.config)

    @classmethod
    def named(cls, config: Any) -> ClientNames:
        """The names that programs have for the layers of a UNet with this config."""
        return replace(cls.clients, comfy=spelling.comfy(spelling.ldm_paths(config)))

    def _encode(self, prompts: Sequence[str]) -> Cond:
        """Last hidden states [B, L, D] of the text tower, after its last norm."""
        text: Any = self.text_encoders["text_encoder"]
        return Cond(text(self._ids("text_encoder", prompts))[0])

    def _pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def _check_parts(self) -> None:
        super()._check_parts()
        if self._unet.config.addition_embed_type is not None:
            raise BaseModelError(f"the base's UNet wants more than a prompt; this is no {self.title}")
