"""Faces, by OpenCV's Haar cascade: offline and quick, made for faces that look into the camera."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from preprocess.types import PreprocessError
from trainer.args import MaskArgs

_CASCADE = "haarcascade_frontalface_default.xml"
_SIDE = 640  # pixels; longer pictures are shrunk to it before the search
_NEIGHBOURS = 5  # windows that must agree; fewer finds faces in clouds
_SMALLEST = 0.08  # of the shorter side; smaller boxes are mostly mistakes
_ROOM = (1.2, 1.5)  # width, height of the ellipse in boxes: the cascade's box ends at brows and chin


class Face:
    """An ellipse around each face, hair and chin included."""

    def __init__(self, options: MaskArgs) -> None:
        del options  # nothing to choose
        self._cv2 = cv2 = _opencv()
        self._cascade = cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / _CASCADE))

    def __call__(self, pictures: Sequence[Image.Image]) -> list[Image.Image | None]:
        return [self._one(picture) for picture in pictures]

    def _one(self, picture: Image.Image) -> Image.Image | None:
        grey = picture.convert("L")
        grey.thumbnail((_SIDE, _SIDE))
        least = max(24, round(_SMALLEST * min(grey.size)))  # 24: the window that the cascade was made with
        boxes = self._cascade.detectMultiScale(
            self._cv2.equalizeHist(np.asarray(grey)),
            scaleFactor=1.1,
            minNeighbors=_NEIGHBOURS,
            minSize=(least, least),
        )
        if not len(boxes):
            return None
        mask = Image.new("L", picture.size)
        draw, scale = ImageDraw.Draw(mask), picture.width / grey.width
        for x, y, w, h in boxes:
            cx, cy = (x + w / 2) * scale, (y + h / 2) * scale
            rx, ry = w * scale * _ROOM[0] / 2, h * scale * _ROOM[1] / 2
            draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=255)
        return mask


def _opencv() -> Any:
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise PreprocessError(
            "data.mask.sources names face, which needs OpenCV: pip install 'opencv-python-headless>=4.14,<5'"
        ) from error
    if not hasattr(cv2, "CascadeClassifier"):
        raise PreprocessError(
            f"data.mask.sources names face, but OpenCV {cv2.__version__} has no cascades any more: "
            "pip install 'opencv-python-headless>=4.14,<5'"
        )
    return cv2
