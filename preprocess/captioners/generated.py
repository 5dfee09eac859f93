"""Captions that a vision-language model writes: BLIP and Florence-2, through transformers.

Greedy search, so that a picture gets the same caption each time. Weights are read from safetensors only.
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


class _Generated:
    """What the two have in common."""

    version = 1
    sees = True

    def __init__(self, options: CaptionModelArgs, place: model.Place) -> None:
        if options.vocabulary is not None:
            raise PreprocessError("data.caption_model.vocabulary is for clip; this captioner writes its own words")
        self._options, self._place = options, place

    def parameters(self) -> Mapping[str, Any]:
        options = self._options
        return {
            "model": self._place.fingerprint(),
            "prompt": options.prompt,
            "tokens": options.tokens,
            "side": options.side,
        }

    def _load(self, kind: Any, processor: Any) -> tuple[Any, Any]:
        where = {"pretrained_model_name_or_path": self._place.base, "revision": self._place.revision or "main"}
        try:
            return (
                kind.from_pretrained(**where, dtype=torch.float32, use_safetensors=True),
                processor.from_pretrained(**where, backend="pil"),
            )
        except (OSError, ValueError) as error:
            raise PreprocessError(f"the captioner's model {self._place.base!r} cannot be loaded: {error}") from error


class Blip(_Generated):
    """A sentence; with a prompt it goes on from these words ("a photo of")."""

    def __init__(self, options: CaptionModelArgs) -> None:
        place = model.find(
            options, "Salesforce/blip-image-captioning-large", "353689b859fcf0523410b1806dace5fb46ecdf41", "blip"
        )
        super().__init__(options, place)

    @contextmanager
    def loaded(self) -> Generator[Write]:
        from transformers import BlipForConditionalGeneration, BlipProcessor

        blip, processor = self._load(BlipForConditionalGeneration, BlipProcessor)
        with model.on_device(blip, self._options.device) as blip:

            def write(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
                prompts = None if self._options.prompt is None else [self._options.prompt] * len(images)
                inputs = processor(images=list(images), text=prompts, return_tensors="pt").to(blip.device)
                ids = blip.generate(**inputs, max_new_tokens=self._options.tokens, do_sample=False, num_beams=1)
                return processor.batch_decode(ids, skip_special_tokens=True)

            yield write


FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")


class Florence2(_Generated):
    """A sentence, a few, or a paragraph, by its task."""

    def __init__(self, options: CaptionModelArgs) -> None:
        place = model.find(
            options, "florence-community/Florence-2-base", "00921df66db728a9ceb750f5eca43e5c203a2051", "florence2"
        )
        super().__init__(options, place)
        self._task = options.prompt or "<DETAILED_CAPTION>"
        if self._task not in FLORENCE_TASKS:
            raise PreprocessError(
                f"data.caption_model.prompt is {self._task!r}, and florence2 writes captions for the tasks "
                f"{', '.join(FLORENCE_TASKS)}"
            )

    @contextmanager
    def loaded(self) -> Generator[Write]:
        from transformers import Florence2ForConditionalGeneration, Florence2Processor

        florence, processor = self._load(Florence2ForConditionalGeneration, Florence2Processor)
        with model.on_device(florence, self._options.device) as florence:

            def write(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
                texts = [self._task] * len(images)
                inputs = processor(images=list(images), text=texts, return_tensors="pt").to(florence.device)
                ids = florence.generate(**inputs, max_new_tokens=self._options.tokens, do_sample=False, num_beams=1)
                said: list[str] = processor.batch_decode(ids, skip_special_tokens=False)
                return [self._parsed(processor, text, image) for text, image in zip(said, images, strict=True)]

            yield write

    def _parsed(self, processor: Any, text: str, image: Image.Image) -> str:
        answer: str = processor.post_process_generation(text=text, task=self._task, image_size=image.size)[self._task]
        return answer.replace("<pad>", "")
