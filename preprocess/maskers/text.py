"""What a text names, by CLIPSeg, whose model is loaded when the stage runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocess.types import PreprocessError
from trainer.args import MaskArgs


class Text:
    """White where the text fits the picture better than `options.threshold`."""

    def __init__(self, options: MaskArgs) -> None:
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor  # heavy, and only wanted here

        assert options.text is not None  # the args see to it
        assert options.base is not None
        self._text, self._threshold = options.text, options.threshold
        self._device = _device(options.device)
        if options.revision is None and not Path(options.base).is_dir():
            raise PreprocessError(
                f"data.mask.base {options.base!r} is no folder; if it is a hub id, say which version of it: "
                "set data.mask.revision to a commit or tag"
            )
        where: dict[str, Any] = {"revision": options.revision} if options.revision else {}
        try:
            self._processor: Any = CLIPSegProcessor.from_pretrained(options.base, **where)
            model: Any = CLIPSegForImageSegmentation.from_pretrained(options.base, dtype="float32", **where)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise PreprocessError(
                f"data.mask.base {options.base!r} cannot be loaded as a CLIPSeg model: {reason}"
            ) from error
        words, known = len(self._processor.tokenizer), model.config.text_config.vocab_size
        if words != known:  # without its files a tokenizer is made of nothing, in silence
            raise PreprocessError(
                f"data.mask.base {options.base!r} has a tokenizer of {words} words, but its weights know {known}; "
                "its tokenizer files are missing or another model's"
            )
        self._model: Any = model.eval().to(self._device)

    def __call__(self, pictures: Sequence[Image.Image]) -> list[Image.Image | None]:
        import torch

        texts = [self._text] * len(pictures)
        inputs = self._processor(text=texts, images=list(pictures), padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**inputs.to(self._device)).logits
        side = logits.shape[-2:]  # a batch of one comes without its first dimension
        likely = torch.sigmoid(logits.reshape(len(pictures), *side)).cpu().numpy()
        return [self._mask(row, picture.size) for row, picture in zip(likely, pictures, strict=True)]

    def _mask(self, likely: NDArray[np.float32], size: tuple[int, int]) -> Image.Image | None:
        """Enlarged to the picture before it is cut, so that the edge is no staircase."""
        smooth = np.asarray(Image.fromarray(likely).resize(size, Image.Resampling.BILINEAR))
        hit = smooth > self._threshold
        return Image.fromarray(hit.astype(np.uint8) * 255) if hit.any() else None


def _device(wanted: str) -> str:
    import torch

    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, there in have.items() if there)
    if not have[wanted]:
        raise PreprocessError(f"data.mask.device is {wanted}, which this machine does not have; use auto or cpu")
    return wanted
