"""OpenCV, which is no part of every installation; and the faces that its cascade finds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocess.types import PreprocessError

PACKAGE = "opencv-python-headless>=4.14,<5"  # 5 has no cascades
_CASCADE = "haarcascade_frontalface_default.xml"
_SIDE = 640  # pixels; longer pictures are shrunk to it before the search
_NEIGHBOURS = 5  # windows that must agree; fewer finds faces in clouds
_SMALLEST = 0.08  # of the shorter side; smaller boxes are mostly mistakes

Box = tuple[float, float, float, float]  # left, top, width, height in pixels of the picture


def opencv(source: str) -> Any:
    """The module cv2.

    Raises:
        PreprocessError: it is missing, or a version without what is needed; the message says what to install.
    """
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise PreprocessError(
            f"data.mask.sources names {source}, which needs OpenCV: pip install '{PACKAGE}', "
            "or do without masks: --no-data.masks --data.crop center"
        ) from error
    if not hasattr(cv2, "CascadeClassifier"):
        raise PreprocessError(
            f"data.mask.sources names {source}, but OpenCV {cv2.__version__} has no cascades any more: "
            f"pip install '{PACKAGE}'"
        )
    return cv2


def cascade(cv2: Any) -> Any:
    """The classifier of faces that look into the camera, which comes with OpenCV."""
    return cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / _CASCADE))


def faces(cv2: Any, classifier: Any, picture: Image.Image) -> list[Box]:
    """The box from brows to chin of each face."""
    grey = picture.convert("L")
    grey.thumbnail((_SIDE, _SIDE))
    least = max(24, round(_SMALLEST * min(grey.size)))  # 24: the window that the cascade was made with
    boxes = classifier.detectMultiScale(
        cv2.equalizeHist(np.asarray(grey)), scaleFactor=1.1, minNeighbors=_NEIGHBOURS, minSize=(least, least)
    )
    scale = picture.width / grey.width
    return [(float(x) * scale, float(y) * scale, float(w) * scale, float(h) * scale) for x, y, w, h in boxes]
