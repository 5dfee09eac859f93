"""People, or whatever labels are asked for, to the pixel: by a segmentation model of transformers."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from preprocess import weights
from preprocess.maskers import Find
from preprocess.types import PreprocessError
from trainer.args import MaskArgs

_OPTION = "data.mask.person"


class Person:
    """White where a label of `person.labels` is the likeliest of all that the model knows.

    Semantic models (SegFormer, UPerNet, ...) and universal ones (Mask2Former, MaskFormer) will do.
    """

    version = 1

    def __init__(self, options: MaskArgs) -> None:
        self._options, self._device = options.person, options.device
        self._place = weights.find(_OPTION, self._options.base, self._options.revision)

    def parameters(self) -> Mapping[str, Any]:
        return {"model": self._place.fingerprint(), "labels": sorted(self._options.labels)}

    @contextmanager
    def loaded(self) -> Generator[Find]:
        from transformers import AutoConfig, AutoImageProcessor  # heavy, and only wanted here

        what = "a segmentation model of transformers"
        config = weights.load(_OPTION, self._place, what, AutoConfig.from_pretrained)
        processor = weights.load(_OPTION, self._place, what, AutoImageProcessor.from_pretrained, backend="pil")
        load = self._kind(config.model_type).from_pretrained
        model = weights.load(_OPTION, self._place, what, load, dtype="float32", use_safetensors=True)
        numbers = weights.known_labels(_OPTION, model, self._options.labels)
        with weights.on_device("data.mask", model, self._device):

            def one(picture: Image.Image) -> Image.Image | None:
                inputs = processor(images=picture, return_tensors="pt").to(model.device)
                (found,) = processor.post_process_semantic_segmentation(
                    model(**inputs), target_sizes=[picture.size[::-1]]
                )
                hit = np.isin(found.cpu().numpy(), numbers)
                return Image.fromarray(hit.astype(np.uint8) * 255) if hit.any() else None

            yield lambda pictures: [one(picture) for picture in pictures]

    def _kind(self, model_type: str) -> Any:
        from transformers import AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

        if model_type in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
            return AutoModelForSemanticSegmentation
        if model_type in ("mask2former", "maskformer"):  # others want more than a picture, or answer otherwise
            return AutoModelForUniversalSegmentation
        raise PreprocessError(
            f"{_OPTION}.base {self._place.base!r} is a model of type {model_type!r}, and person needs a semantic "
            "segmentation model, such as segformer, or mask2former or maskformer"
        )
