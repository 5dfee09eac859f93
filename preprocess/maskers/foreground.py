"""What stands before the background, by OpenCV's GrabCut: offline, no model, for one subject before a plain scene.

The picture's border is taken for background, so a subject that the border cuts is cut too, unless it is a person whose
face is found: then the bottom below the face may belong to it. Colours decide, so what is coloured like the background
is taken for it. Rother et al., GrabCut, 2004.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from preprocess.maskers import Find
from preprocess.maskers.opencv import Box, cascade, faces, opencv
from trainer.args import MaskArgs

_SIDE = 320  # pixels; longer pictures are shrunk to it: time grows with their area, and edges gain little
_BORDER = 0.04  # of the shorter side
_ROUNDS = 5
_BODY = 3.0  # widths of a face; what below it is not held to be background at the picture's lower border
_SPECK = 0.005  # of the picture; smaller islands are noise
_MOST = 0.95  # of the picture; more than this is no foreground

Bytes = NDArray[np.uint8]


class Foreground:
    """White where a picture is unlike its border, and like the face in it if there is one."""

    version = 1

    def __init__(self, options: MaskArgs) -> None:
        """Takes no option."""

    def parameters(self) -> Mapping[str, Any]:
        return {}

    @contextmanager
    def loaded(self) -> Generator[Find]:
        cv2 = opencv("foreground")
        classifier = cascade(cv2)

        def find(pictures: Sequence[Image.Image]) -> list[Image.Image | None]:
            return [_cut(cv2, picture, faces(cv2, classifier, picture)) for picture in pictures]

        yield find


def _cut(cv2: Any, picture: Image.Image, boxes: Sequence[Box]) -> Image.Image | None:
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    scale = small.width / picture.width
    labels = _seeds(cv2, small.size, [(x * scale, y * scale, w * scale, h * scale) for x, y, w, h in boxes])
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)  # its clusters start at random
    cv2.grabCut(np.asarray(small)[..., ::-1].copy(), labels, None, *models, _ROUNDS, cv2.GC_INIT_WITH_MASK)
    hit = _without_specks(cv2, np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)))
    if not 0 < hit.mean() <= _MOST:
        return None
    smooth = Image.fromarray(hit.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR)
    mask = smooth.point([255 if value > 127 else 0 for value in range(256)])
    return mask if mask.getbbox() else None


def _seeds(cv2: Any, size: tuple[int, int], boxes: Sequence[Box]) -> Bytes:
    """GrabCut's labels to start from, [h, w]: the border is background, the middle of a face is not."""
    width = max(1, round(_BORDER * min(size)))
    labels = Image.new("L", size, cv2.GC_BGD)
    labels.paste(cv2.GC_PR_FGD, (width, width, size[0] - width, size[1] - width))
    draw = ImageDraw.Draw(labels)
    for x, y, w, h in boxes:
        middle = x + w / 2
        draw.rectangle((middle - _BODY * w / 2, y + h, middle + _BODY * w / 2, size[1]), fill=cv2.GC_PR_FGD)
        draw.ellipse((x + w * 0.15, y + h * 0.1, x + w * 0.85, y + h * 0.95), fill=cv2.GC_FGD)
    return np.array(labels)


def _without_specks(cv2: Any, hit: NDArray[np.bool_]) -> NDArray[np.bool_]:
    _, islands, stats, _ = cv2.connectedComponentsWithStats(hit.astype(np.uint8), connectivity=8)
    large = [n for n in range(1, len(stats)) if stats[n, cv2.CC_STAT_AREA] >= _SPECK * hit.size]
    return np.isin(islands, large)
