"""What a text names, by CLIPSeg, whose model is loaded when the stage runs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocess import weights
from preprocess.maskers import Find
from preprocess.types import PreprocessError
from trainer.args import MaskArgs

_OPTION = "data.mask"


class Text:
    """White where the text fits the picture better than `options.threshold`."""

    version = 1

    def __init__(self, options: MaskArgs) -> None:
        assert options.text is not None  # the args see to it
        self._text, self._threshold, self._device = options.text, options.threshold, options.device
        self._place = weights.find(_OPTION, options.base, options.revision)

    def parameters(self) -> Mapping[str, Any]:
        return {"model": self._place.fingerprint(), "text": self._text, "threshold": self._threshold}

    @contextmanager
    def loaded(self) -> Generator[Find]:
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor  # heavy, and only wanted here

        what = "a CLIPSeg model"
        processor = weights.load(_OPTION, self._place, what, CLIPSegProcessor.from_pretrained)
        load = CLIPSegForImageSegmentation.from_pretrained
        model = weights.load(_OPTION, self._place, what, load, dtype="float32", use_safetensors=True)
        words, known = len(processor.tokenizer), model.config.text_config.vocab_size
        if words != known:  # without its files a tokenizer is made of nothing, in silence
            raise PreprocessError(
                f"{_OPTION}.base {self._place.base!r} has a tokenizer of {words} words, but its weights know {known}; "
                "its tokenizer files are missing or another model's"
            )
        with weights.on_device(_OPTION, model, self._device):
            yield lambda pictures: self._masks(processor, model, pictures)

    def _masks(self, processor: Any, model: Any, pictures: Sequence[Image.Image]) -> list[Image.Image | None]:
        texts = [self._text] * len(pictures)
        inputs = processor(text=texts, images=list(pictures), padding=True, return_tensors="pt")
        logits = model(**inputs.to(model.device)).logits
        side = logits.shape[-2:]  # a batch of one comes without its first dimension
        likely = logits.reshape(len(pictures), *side).sigmoid().cpu().numpy()
        return [self._mask(row, picture.size) for row, picture in zip(likely, pictures, strict=True)]

    def _mask(self, likely: NDArray[np.float32], size: tuple[int, int]) -> Image.Image | None:
        """Enlarged to the picture before it is cut, so that the edge is no staircase."""
        smooth = np.asarray(Image.fromarray(likely).resize(size, Image.Resampling.BILINEAR))
        hit = smooth > self._threshold
        return Image.fromarray(hit.astype(np.uint8) * 255) if hit.any() else None
