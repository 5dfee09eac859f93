"""Swin2SR of transformers, in overlapping tiles, so that memory does not grow with the picture.

Conde et al., Swin2SR: SwinV2 Transformer for Compressed Image Super-Resolution and Restoration, 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocess import weights
from preprocess.types import PreprocessError
from preprocess.upscalers import Enlarge
from trainer.args import UpscaleArgs

_OPTION = "data.upscale"

Pixels = NDArray[np.float32]  # [h, w, 3] in 0..1


class Swin2SR:
    """Enlarges as many times as its model was made for: 2 or 4."""

    version = 1

    def __init__(self, options: UpscaleArgs) -> None:
        self._options = options
        self._place = weights.find(_OPTION, options.base, options.revision)

    def parameters(self) -> Mapping[str, Any]:
        return {
            "model": self._place.fingerprint(),
            "tile": self._options.tile,
            "overlap": self._options.overlap,
        }

    @contextmanager
    def loaded(self) -> Generator[Enlarge]:
        import torch
        from transformers import Swin2SRForImageSuperResolution  # heavy, and only wanted here

        config, model = self._model(Swin2SRForImageSuperResolution)
        window = int(config.window_size)
        with weights.on_device(_OPTION, model, self._options.device):

            def forward(pixels: Pixels) -> Pixels:
                batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()).to(model.device)
                return model(pixel_values=batch).reconstruction[0].permute(1, 2, 0).float().cpu().numpy()

            def enlarge(picture: Image.Image) -> Image.Image:
                pixels = np.asarray(picture, np.float32) / np.float32(255)
                large = tiled(forward, pixels, int(config.upscale), window, self._options.tile, self._options.overlap)
                return Image.fromarray((large.clip(0, 1) * 255).round().astype(np.uint8))

            yield enlarge

    def _model(self, kind: Any) -> tuple[Any, Any]:
        from transformers import AutoConfig

        config = weights.load(_OPTION, self._place, "a Swin2SR model", AutoConfig.from_pretrained)
        if config.model_type != "swin2sr" or config.upscale < 2 or config.num_channels != 3:
            raise PreprocessError(
                f"{_OPTION}.base {self._place.base!r} is no Swin2SR model that enlarges colour pictures "
                f"(it is of type {config.model_type!r})"
            )
        load = kind.from_pretrained
        model = weights.load(_OPTION, self._place, "a Swin2SR model", load, dtype="float32", use_safetensors=True)
        return config, model


def tiled(
    forward: Callable[[Pixels], Pixels], pixels: Pixels, factor: int, window: int, tile: int, overlap: int
) -> Pixels:
    """`forward` of the whole picture, from tiles: [h, w, 3] -> [h * factor, w * factor, 3].

    In the overlap of two tiles, the outer quarters are left to the one that sees beyond them, and one fades into the
    other between. Tiles begin at multiples of `window`, so that attention sees the windows of the untiled picture.

    Args:
        forward: [h, w, 3] -> [h * factor, w * factor, 3], for sides that are multiples of `window`.
        window: pixels; the model's attention window. `tile` and `overlap` are rounded to it.
    """
    height, width = pixels.shape[:2]
    pixels = np.pad(pixels, ((0, -height % window), (0, -width % window), (0, 0)), "symmetric")
    overlap = -(-overlap // window) * window
    tile = max(tile // window * window, 2 * overlap, window)
    total = np.zeros((pixels.shape[0] * factor, pixels.shape[1] * factor, 3), np.float32)
    weight = np.zeros((*total.shape[:2], 1), np.float32)
    for top, bottom, down in _spans(pixels.shape[0], tile, overlap, factor):
        for left, right, across in _spans(pixels.shape[1], tile, overlap, factor):
            part = forward(pixels[top:bottom, left:right])
            share = (down[:, None] * across[None])[..., None]
            rows, columns = slice(top * factor, bottom * factor), slice(left * factor, right * factor)
            total[rows, columns] += part * share
            weight[rows, columns] += share
    return (total / weight)[: height * factor, : width * factor]


def _spans(length: int, tile: int, overlap: int, factor: int) -> list[tuple[int, int, Pixels]]:
    """(start, end, how much each enlarged pixel counts) of the tiles along one side."""
    step = max(tile - overlap, 1)
    starts = [0]
    while starts[-1] + tile < length:
        starts.append(starts[-1] + step)
    spans: list[tuple[int, int, Pixels]] = []
    for start in starts:
        end = min(start + tile, length)
        share = np.ones((end - start) * factor, np.float32)
        if overlap:
            place = (np.arange(overlap * factor, dtype=np.float32) + 0.5) / (overlap * factor)
            ramp = (2 * place - 0.5).clip(0, 1)
            if start > 0:
                share[: len(ramp)] *= ramp
            if end < length:
                share[-len(ramp) :] *= ramp[::-1]
        spans.append((start, end, share))
    return spans
