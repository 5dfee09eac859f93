"""Latents and text embeddings on disk, under the names of their pictures and captions, keyed by content.

    <folder>/<name>.<key>.safetensors    key: 16 hex digits of sha256 over everything that the content depends on

The full key text lies in each file's header and is compared when the file is read. Deleting any file is safe.
Everything is encoded one at a time, so that an entry does not depend on what it was encoded with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.rundir import atomic_write
from trainer.types import Cond, ModelFamily

log = logging.getLogger(__name__)

CROP = "cover, centred, lanczos"  # how pictures become pixels; another way needs another word


class Picture(Protocol):
    """What a latent depends on, of a picture."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def bucket(self) -> tuple[int, int]: ...
    @property
    def centering(self) -> tuple[float, float]: ...


P = TypeVar("P", bound=Picture)


def cached(
    folder: Path, name: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors that `make` gives for `key`: from the disk when they are there, else made and kept.

    Args:
        name: shown in the file's name, for people; plays no part in finding the right content.
        key: all that the content depends on, as JSON.
    """
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{slug(name)}.{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        try:
            return _read(path, text)
        except (SafetensorError, ValueError) as error:
            log.warning("the cache file %s is damaged and made again: %s", path, error)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
    atomic_write(path, safetensors.torch.save(tensors, metadata={"key": text}))
    return tensors


def _read(path: Path, text: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("key") != text:
            raise ValueError("its key is another one")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict


def slug(name: str) -> str:
    """`name` as a file name that a person recognises: letters, digits, dot, dash and underscore, 1 to 60 of them."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._")[:60] or "empty"


def cache_latents(
    folder: Path,
    pictures: Sequence[P],
    family: ModelFamily,
    load: Callable[[P], Tensor],
    device: torch.device,
    *,
    mirrored: bool = False,
) -> dict[str, Tensor]:
    """Picture name -> latents [C, H, W], float32 on the CPU.

    Args:
        load: a picture -> its pixels [3, h, w] in -1..1.
        mirrored: encode the pictures flipped left to right.
    """
    vae = family.fingerprint("vae")
    latents: dict[str, Tensor] = {}
    for picture in pictures:
        key = {
            "kind": "latents",
            "picture": picture.sha256,
            "bucket": list(picture.bucket),
            "crop": CROP if picture.centering == (0.5, 0.5) else f"{CROP}, but at {picture.centering}",
            "mirrored": mirrored,
            "family": family.name,
            "vae": vae,
            "dtype": _dtype(family.vae),
        }

        def make(picture: P = picture) -> dict[str, Tensor]:
            pixels = load(picture)
            with torch.no_grad():
                return {"latents": family.encode_images((pixels.flip(-1) if mirrored else pixels)[None].to(device))[0]}

        name = f"{picture.name}.mirrored" if mirrored else picture.name
        latents[picture.name] = cached(folder, name, key, make)["latents"].float()
    return latents


class TextCache:
    """Captions -> Cond from the disk, for a run that does not train text."""

    def __init__(self, folder: Path, family: ModelFamily, device: torch.device) -> None:
        self._folder, self._family, self._device = folder, family, device
        self._encoders = {
            name: {"weights": family.fingerprint(name), "dtype": _dtype(encoder)}
            for name, encoder in family.text_encoders.items()
        }
        self._conds: dict[str, Cond] = {}

    def __call__(self, captions: Sequence[str]) -> Cond:
        """One row for each caption, on the device that the cache was made for."""
        conds = [self._cond(caption) for caption in captions]
        pooled = [cond.pooled for cond in conds if cond.pooled is not None]
        return Cond(torch.cat([cond.hidden for cond in conds]), torch.cat(pooled) if pooled else None)

    def _cond(self, caption: str) -> Cond:
        if caption not in self._conds:
            key = {
                "kind": "text",
                "caption": caption,
                "tokens": {name: _tokens(tokenizer, caption) for name, tokenizer in self._family.tokenizers.items()},
                "family": self._family.name,
                "encoders": self._encoders,
            }
            tensors = {
                name: tensor.to(self._device)
                for name, tensor in cached(self._folder, caption, key, lambda: self._encode(caption)).items()
            }
            self._conds[caption] = Cond(tensors["hidden"], tensors.get("pooled"))
        return self._conds[caption]

    def _encode(self, caption: str) -> dict[str, Tensor]:
        with torch.no_grad():
            cond = self._family.encode([caption])
        return {"hidden": cond.hidden} if cond.pooled is None else {"hidden": cond.hidden, "pooled": cond.pooled}


def _tokens(tokenizer: Any, caption: str) -> list[int]:
    """The ids that the encoder is shown: they stand for the tokenizer's vocabulary, merges, length and padding."""
    return tokenizer(caption, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids


def _dtype(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype)
