"""Tags of the WD taggers v3 (SmilingWolf's ViT, SwinV2, EVA02), through onnxruntime: "1girl, long hair, smile".

A tagger is a folder or hub id with two files, and no other is opened: model.onnx, [N, side, side, 3] in BGR from 0 to
255 -> a score from 0 to 1 for each tag, and selected_tags.csv, with the tags' name and category in that order. The
graph is data: onnxruntime runs its own operators alone, and a library of others is never loaded.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocess.captioners import Write, model
from preprocess.types import Item, PreprocessError
from trainer.args import CaptionModelArgs

GRAPH, TAGS = "model.onnx", "selected_tags.csv"
GENERAL, CHARACTER = 0, 4  # categories; others, ratings above all, are no part of a caption
_TAGS_BYTES = 16 * 2**20
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Tag:
    """One line of the list."""

    text: str  # as captions spell it
    category: int


class WdTagger:
    """The characters that it is sure of, then the other tags; the surest first."""

    version = 1
    sees = True

    def __init__(self, options: CaptionModelArgs) -> None:
        model.check_used(options, "wd-tagger", {"general_threshold", "character_threshold"})
        self._options = options
        self._place = model.find(
            options, "SmilingWolf/wd-vit-tagger-v3", "790b0e92cefd2a0221451604e7831fe643ab7c4f", None
        )
        folder = self._place.folder
        if folder is not None and (missing := [name for name in (GRAPH, TAGS) if not (folder / name).is_file()]):
            raise PreprocessError(f"data.caption_model.base {str(folder)!r} is no tagger: {missing[0]} is missing")
        self._thresholds = {GENERAL: options.general_threshold, CHARACTER: options.character_threshold}
        _runtime()

    def parameters(self) -> Mapping[str, Any]:
        return {
            "model": self._place.fingerprint(),
            "side": self._options.side,
            "thresholds": [self._thresholds[GENERAL], self._thresholds[CHARACTER]],
        }

    @contextmanager
    def loaded(self) -> Generator[Write]:
        tags = read_tags(self._file(TAGS))
        session = _session(self._file(GRAPH), self._options.device)
        (given, *_), (asked, *_) = session.get_inputs(), session.get_outputs()
        at_once, side = _shape(given.shape, self._place.base)

        def scores(images: Sequence[Image.Image]) -> Scores:
            rest = [images[-1]] * ((at_once or 0) - len(images))  # a graph for so many takes no fewer
            pixels = np.stack([squared(image, side) for image in [*images, *rest]])
            rows: Any = session.run([asked.name], {given.name: pixels})[0]
            return _checked(rows, len(tags))[: len(images)]

        def write(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
            step = at_once or len(images)
            rows = [row for i in range(0, len(images), step) for row in scores(images[i : i + step])]
            return [caption(row, tags, self._thresholds) for row in rows]

        yield write

    def _file(self, name: str) -> Path:
        if self._place.folder is not None:
            return self._place.folder / name
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self._place.base, name, revision=self._place.revision))
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise PreprocessError(f"the tagger {self._place.base!r} cannot be loaded: {reason}") from error


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise PreprocessError(
            "data.captioner wd-tagger needs onnxruntime: .venv/bin/python -m pip install onnxruntime (or "
            "onnxruntime-gpu, for NVIDIA GPUs)"
        ) from error
    return onnxruntime


def _session(graph: Path, device: str) -> Any:
    runtime = _runtime()
    there = set(runtime.get_available_providers())
    wanted = "cuda" if device == "auto" and _PROVIDERS["cuda"] in there else device.replace("auto", "cpu")
    if wanted not in _PROVIDERS or _PROVIDERS[wanted] not in there:
        raise PreprocessError(
            f"data.caption_model.device is {device}, and onnxruntime here runs wd-tagger on "
            f"{' and '.join(name for name, provider in _PROVIDERS.items() if provider in there)}"
        )
    options = runtime.SessionOptions()
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    providers = list(dict.fromkeys([_PROVIDERS[wanted], _PROVIDERS["cpu"]]))
    try:
        session = runtime.InferenceSession(str(graph), options, providers=providers)
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "onnxruntime":
            raise
        reason = str(error).strip().partition("\n")[0]
        raise PreprocessError(f"the tagger {str(graph)!r} is no graph that onnxruntime runs: {reason}") from error
    if device == "cuda" and session.get_providers()[0] != _PROVIDERS["cuda"]:
        raise PreprocessError(
            "data.caption_model.device is cuda, and onnxruntime could not start on it; use auto or cpu"
        )
    return session


def _shape(shape: Sequence[Any], base: str) -> tuple[int | None, int]:
    """(pictures at once where the graph fixes it, side in pixels) of its input."""
    if len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int) or shape[1] != shape[2]:
        raise PreprocessError(f"the tagger {base!r} takes an input {list(shape)}, and [N, side, side, 3] is needed")
    return (shape[0] if isinstance(shape[0], int) else None), shape[1]


def squared(image: Image.Image, side: int) -> Scores:
    """The picture in the middle of a white square, resized: [side, side, 3], BGR, 0..255."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square, np.float32)[:, :, ::-1]


def _checked(rows: NDArray[Any], tags: int) -> Scores:
    if rows.ndim != 2 or rows.shape[1] != tags:
        raise PreprocessError(f"the tagger gives {list(rows.shape)} scores, and its {TAGS} names {tags} tags")
    if not ((rows >= 0) & (rows <= 1)).all():
        raise PreprocessError("the tagger gives scores outside 0..1, which no threshold can be held against")
    return rows


def caption(scores: Scores, tags: Sequence[Tag], thresholds: Mapping[int, float]) -> str:
    """The tags whose scores reach their category's threshold."""
    sure = [
        (tag.category != CHARACTER, -float(score), tag.text)
        for tag, score in zip(tags, scores, strict=True)
        if score >= thresholds.get(tag.category, np.inf)
    ]
    return ", ".join(text for _, _, text in sorted(sure))


def read_tags(path: Path) -> list[Tag]:
    """The list, in its own order.

    Raises:
        PreprocessError: it is no such list.
    """
    if path.stat().st_size > _TAGS_BYTES:
        raise PreprocessError(f"{str(path)!r} has more than the {_TAGS_BYTES} bytes that a list of tags may have")
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True))
        tags = [Tag(spelled(row["name"]), int(row["category"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise PreprocessError(f"{str(path)!r} is no list of tags with the columns name and category") from error
    if not tags:
        raise PreprocessError(f"{str(path)!r} names no tags")
    return tags


def spelled(tag: str) -> str:
    """long_hair -> long hair; a face drawn with signs keeps what holds it together: ^_^, o_o, (o)_(o)."""
    left, joint, right = tag.partition("_")
    if joint and all(re.fullmatch(r"[^\w,]*\w?[^\w,]*", part) for part in (left, right)) and "_" not in right:
        return tag
    return tag.replace("_", " ").strip()
