"""The Stable Diffusion 2 family: 1.5's parts with OpenCLIP's text tower, in bases that predict eps (512) or v (768).

The tower of a diffusers folder ends at the layer before the last, which is what the UNet was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from trainer.models import original
from trainer.models.parts import Parts
from trainer.models.sd15 import SD15


class SD2(SD15):
    """Frozen Stable Diffusion 2.x: loads itself, encodes, predicts."""

    name = "sd2"
    title = "Stable Diffusion 2"
    clients = replace(
        SD15.clients, base_version="sd_v2", architecture="stable-diffusion-v2-512", facts={"ss_v2": "True"}
    )
    original_towers: ClassVar[Mapping[str, original.Tower]] = {
        "text_encoder": original.open_clip("cond_stage_model.model.")
    }

    def __init__(
        self, base: Parts, *, prediction: str = "auto", clip_folders: Mapping[str, Path] | None = None
    ) -> None:
        super().__init__(base, prediction=prediction, clip_folders=clip_folders)
        if self.path.target == "v_prediction":
            self.clients = replace(
                self.clients,
                base_version="sd_v2_v",
                architecture="stable-diffusion-v2-768-v",
                facts={"ss_v2": "True", "ss_v_parameterization": "True"},
            )
