"""What an object detector of transformers puts a box around: faces, people, dogs, by the labels that it knows."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageDraw

from preprocess import weights
from preprocess.maskers import Find
from trainer.args import MaskArgs

_OPTION = "data.mask.detect"


class Detect:
    """An ellipse in, or all of, each box whose label is among `detect.labels`, grown by `detect.grow`."""

    version = 1

    def __init__(self, options: MaskArgs) -> None:
        self._options, self._device = options.detect, options.device
        self._place = weights.find(_OPTION, self._options.base, self._options.revision)

    def parameters(self) -> Mapping[str, Any]:
        return {
            "model": self._place.fingerprint(),
            **self._options.model_dump(mode="json", exclude={"base", "revision"}),
        }

    @contextmanager
    def loaded(self) -> Generator[Find]:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection  # heavy, and only wanted here

        what = "an object detector of transformers"
        processor = weights.load(_OPTION, self._place, what, AutoImageProcessor.from_pretrained, backend="pil")
        load = AutoModelForObjectDetection.from_pretrained
        model = weights.load(_OPTION, self._place, what, load, dtype="float32", use_safetensors=True)
        numbers = weights.known_labels(_OPTION, model, self._options.labels)
        with weights.on_device("data.mask", model, self._device):
            yield lambda pictures: [self._one(processor, model, numbers, picture) for picture in pictures]

    def _one(self, processor: Any, model: Any, numbers: Sequence[int], picture: Image.Image) -> Image.Image | None:
        """Alone, for in a batch its box would depend on how others are padded."""
        inputs = processor(images=picture, return_tensors="pt").to(model.device)
        (found,) = processor.post_process_object_detection(
            model(**inputs), threshold=self._options.threshold, target_sizes=[picture.size[::-1]]
        )
        labelled = zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True)
        return self._mask(picture.size, [box for box, number in labelled if number in numbers])

    def _mask(self, size: tuple[int, int], boxes: Sequence[Sequence[float]]) -> Image.Image | None:
        mask = Image.new("L", size)
        draw = ImageDraw.Draw(mask)
        shape = draw.ellipse if self._options.shape == "ellipse" else draw.rectangle
        for left, top, right, bottom in boxes:
            dx, dy = (self._options.grow - 1) * (right - left) / 2, (self._options.grow - 1) * (bottom - top) / 2
            if right > left and bottom > top:
                shape((left - dx, top - dy, right + dx, bottom + dy), fill=255)
        return mask if mask.getbbox() else None
