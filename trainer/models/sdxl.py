"""The Stable Diffusion XL family: two CLIP text towers, a pooled text vector, a UNet that is told the picture's sizes.

Shapes: B pictures, H W latent height and width, L tokens, D text width, P width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from trainer.models import original, spelling
from trainer.models.latent import LatentFamily
from trainer.models.parts import Parts
from trainer.types import BaseModelError, ClientNames, Cond, Task

KOHYA = {"denoiser": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
SIZES = 6  # original height and width, crop top and left, target height and width
NO_EOS = 2  # what old configs of CLIP say where their end token should be; transformers then takes the largest id


class SDXL(LatentFamily):
    """Frozen SDXL base: loads itself, encodes, predicts.

    The empty prompt is encoded, in training (dropped captions) as in sampling (an empty negative prompt), as ComfyUI
    and A1111 do. A stock pipeline that is given no negative prompt at all takes zeros for it where the base's
    force_zeros_for_empty_prompt is on; `pipeline()` keeps that.
    """

    name = "sdxl"
    title = "Stable Diffusion XL"
    pipelines: ClassVar[Mapping[Task, str]] = {
        "text": "StableDiffusionXLPipeline",
        "image": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
    }
    towers: ClassVar[Mapping[str, Any]] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    original_towers: ClassVar[Mapping[str, original.Tower]] = {
        "text_encoder": original.clip("conditioner.embedders.0.transformer."),
        "text_encoder_2": original.open_clip("conditioner.embedders.1.model."),
    }

    def __init__(
        self, base: Parts, *, prediction: str = "auto", clip_folders: Mapping[str, Path] | None = None
    ) -> None:
        super().__init__(base, prediction=prediction, clip_folders=clip_folders)
        self.clients = self.named(self._unet.config)
        pooling: Any = self.text_encoders["text_encoder_2"]
        if pooling.text_model.eos_token_id == NO_EOS:
            # The largest id is the end token's until placeholder tokens with larger ids are learned: then the pooled
            # vector would be read off one of them, and not off the end as ComfyUI and A1111 do. Without them nothing
            # changes.
            pooling.text_model.eos_token_id = self.tokenizers["text_encoder_2"].eos_token_id

    @classmethod
    def named(cls, config: Any) -> ClientNames:
        """The names that programs have for the layers of a UNet with this config."""
        ldm = spelling.ldm_paths(config)
        return ClientNames(
            base_version="sdxl_base_v1-0",
            architecture="stable-diffusion-xl-v1-base",
            diffusers=spelling.diffusers,
            kohya=spelling.kohya(KOHYA, ldm),
            comfy=spelling.comfy(ldm),
            embeddings={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        )

    def _encode(self, prompts: Sequence[str]) -> Cond:
        """hidden [B, L, D]: the last but one layer of both towers, side by side; pooled [B, P]: the second's."""
        outputs = [
            encoder(self._ids(name, prompts), output_hidden_states=True)
            for name, encoder in zip(self.text_encoders, self._towers(), strict=True)
        ]
        return Cond(torch.cat([out.hidden_states[-2] for out in outputs], dim=-1), outputs[1].text_embeds)

    def _added(self, xt: Tensor, cond: Cond) -> dict[str, Tensor]:
        """The pooled text and the time ids [B, 6], which without `cond.sizes` are of a whole picture of this size."""
        assert cond.pooled is not None
        sizes = cond.sizes
        if sizes is None:
            height, width = (side * self.latent_scale for side in xt.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=xt.device).expand(len(xt), SIZES)
        return {"text_embeds": cond.pooled.to(self._unet.dtype), "time_ids": sizes.to(xt.device, torch.float32)}

    def _pipeline_options(self) -> dict[str, Any]:
        zeros = bool(self._index.get("force_zeros_for_empty_prompt", True))
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}

    def _check_parts(self) -> None:
        super()._check_parts()
        unet = self._unet.config
        if unet.addition_embed_type != "text_time":
            raise BaseModelError("the base's UNet takes no sizes of pictures; this is no Stable Diffusion XL")
        pooled = self._towers()[1].config.projection_dim
        ours = SIZES * unet.addition_time_embed_dim + pooled
        if unet.projection_class_embeddings_input_dim != ours:
            raise BaseModelError(
                f"the base's UNet wants {unet.projection_class_embeddings_input_dim} numbers beside the prompt, and "
                f"{SIZES} sizes with a pooled text of width {pooled} make {ours}; the refiner cannot be trained on"
            )
