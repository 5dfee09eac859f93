"""Faces, by OpenCV's Haar cascade: offline and quick, made for faces that look into the camera."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageDraw

from preprocess.maskers import Find
from preprocess.maskers.opencv import Box, cascade, faces, opencv
from trainer.args import MaskArgs

_ROOM = (1.2, 1.5)  # width, height of the ellipse in boxes: the cascade's box ends at brows and chin


class Face:
    """An ellipse around each face, hair and chin included."""

    version = 1

    def __init__(self, options: MaskArgs) -> None:
        """Takes no option."""

    def parameters(self) -> Mapping[str, Any]:
        return {}

    @contextmanager
    def loaded(self) -> Generator[Find]:
        cv2 = opencv("face")
        classifier = cascade(cv2)

        def find(pictures: Sequence[Image.Image]) -> list[Image.Image | None]:
            return [_ellipses(picture.size, faces(cv2, classifier, picture)) for picture in pictures]

        yield find


def _ellipses(size: tuple[int, int], boxes: Sequence[Box]) -> Image.Image | None:
    if not boxes:
        return None
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for x, y, w, h in boxes:
        cx, cy = x + w / 2, y + h / 2
        rx, ry = w * _ROOM[0] / 2, h * _ROOM[1] / 2
        draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=255)
    return mask
