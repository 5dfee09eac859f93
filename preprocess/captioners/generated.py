"""Captions that a vision-language model writes: BLIP and Florence-2, through transformers.

Greedy search, so that a picture gets the same caption each time. Weights are read from safetensors only, and code
that comes with them is never run.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from preprocess.captioners import Write, model
from preprocess.types import Item, PreprocessError
from trainer.args import CaptionModelArgs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Generated:
    """What writes its own words has this in common."""

    version = 1
    sees = True
    large = False  # so large that auto takes half the bits on a GPU

    def __init__(self, options: CaptionModelArgs, name: str, place: model.Place) -> None:
        model.check_used(options, name, {"prompt", "tokens", "dtype"})
        self._options, self._place = options, place

    def parameters(self) -> Mapping[str, Any]:
        options, dtype = self._options, self._dtype()
        return {
            "model": self._place.fingerprint(),
            "prompt": options.prompt,
            "tokens": options.tokens,
            "side": options.side,
            **({} if dtype == "fp32" else {"dtype": dtype}),
        }

    def _device(self) -> str:
        return model.device_of(self._options.device)

    def _dtype(self) -> str:
        if self._options.dtype != "auto":
            return self._options.dtype
        return "bf16" if self.large and self._device() == "cuda" else "fp32"

    def _network(self, kind: Any) -> Any:
        return self._read(kind, dtype=DTYPES[self._dtype()], use_safetensors=True)

    def _read(self, kind: Any, **more: Any) -> Any:
        where: dict[str, Any] = {
            "pretrained_model_name_or_path": self._place.base,
            "revision": self._place.revision or "main",
            "trust_remote_code": False,
        }
        try:
            return kind.from_pretrained(**where, **more)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise PreprocessError(f"the captioner's model {self._place.base!r} cannot be loaded: {reason}") from error


class Blip(Generated):
    """A sentence; with a prompt it goes on from these words ("a photo of")."""

    def __init__(self, options: CaptionModelArgs) -> None:
        place = model.find(
            options, "Salesforce/blip-image-captioning-large", "353689b859fcf0523410b1806dace5fb46ecdf41", {"blip"}
        )
        super().__init__(options, "blip", place)

    @contextmanager
    def loaded(self) -> Generator[Write]:
        from transformers import BlipForConditionalGeneration, BlipProcessor

        blip = self._network(BlipForConditionalGeneration)
        processor = self._read(BlipProcessor, backend="pil")
        with model.on_device(blip, self._device()) as blip:

            def write(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
                prompts = None if self._options.prompt is None else [self._options.prompt] * len(images)
                inputs = processor(images=list(images), text=prompts, return_tensors="pt").to(blip.device, blip.dtype)
                ids = blip.generate(**inputs, max_new_tokens=self._options.tokens, **model.GREEDY)
                return processor.batch_decode(ids, skip_special_tokens=True)

            yield write


FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")


class Florence2(Generated):
    """A sentence, a few, or a paragraph, by its task."""

    def __init__(self, options: CaptionModelArgs) -> None:
        place = model.find(
            options, "florence-community/Florence-2-base", "00921df66db728a9ceb750f5eca43e5c203a2051", {"florence2"}
        )
        super().__init__(options, "florence2", place)
        self._task = options.prompt or "<DETAILED_CAPTION>"
        if self._task not in FLORENCE_TASKS:
            raise PreprocessError(
                f"data.caption_model.prompt is {self._task!r}, and florence2 writes captions for the tasks "
                f"{', '.join(FLORENCE_TASKS)}"
            )

    @contextmanager
    def loaded(self) -> Generator[Write]:
        from transformers import Florence2ForConditionalGeneration, Florence2Processor

        florence = self._network(Florence2ForConditionalGeneration)
        processor = self._read(Florence2Processor, backend="pil")
        with model.on_device(florence, self._device()) as florence:

            def write(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
                texts = [self._task] * len(images)
                inputs = processor(images=list(images), text=texts, return_tensors="pt").to(
                    florence.device, florence.dtype
                )
                ids = florence.generate(**inputs, max_new_tokens=self._options.tokens, **model.GREEDY)
                said: list[str] = processor.batch_decode(ids, skip_special_tokens=False)
                return [self._parsed(processor, text, image) for text, image in zip(said, images, strict=True)]

            yield write

    def _parsed(self, processor: Any, text: str, image: Image.Image) -> str:
        answer: str = processor.post_process_generation(text=text, task=self._task, image_size=image.size)[self._task]
        return answer.replace("<pad>", "")
