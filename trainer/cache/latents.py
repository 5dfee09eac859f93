"""Latents and masks of whole datasets: what is missing is made, and all of it is read when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from trainer.cache.shards import Digest, Key, Shards, digest
from trainer.progress import Progress
from trainer.share import ALONE, Share
from trainer.types import ModelFamily
from trainer.view import PLAIN, Version, label

PIXELS = "lanczos; brightness, contrast, saturation"  # how a box becomes pixels; another way needs another word
MASK = "bilinear, averaged over each latent; ones where it is empty"


class Picture(Protocol):
    """What a latent depends on, of a picture."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def bucket(self) -> tuple[int, int]: ...
    @property
    def original(self) -> tuple[int, int] | None: ...
    @property
    def centering(self) -> tuple[float, float]: ...
    @property
    def mask(self) -> Path | None: ...


P = TypeVar("P", bound=Picture)


class Stored(Mapping[str, Tensor]):
    """Label of a version -> its tensor, float32 on the CPU, read from the disk each time."""

    def __init__(self, shards: Shards, entries: Mapping[str, Digest]) -> None:
        self._shards, self._entries = shards, entries

    def __getitem__(self, label: str) -> Tensor:
        (tensor,) = self._shards.read(self._entries[label]).values()
        return tensor.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def plain(picture: Picture) -> Sequence[Version]:
    """The one version that a picture has when nothing is augmented."""
    return PLAIN.versions(picture)


def cache_latents(
    folder: Path,
    pictures: Sequence[P],
    family: ModelFamily,
    load: Callable[[P, Version], Tensor],
    device: torch.device,
    *,
    versions: Callable[[P], Sequence[Version]] = plain,
    share: Share = ALONE,
) -> Stored:
    """`view.label` of every version of every picture -> latents [C, H, W].

    Args:
        load: its pixels [3, h, w] in -1..1.
        share: of several processes that all call this: each encodes its part, all of them get the whole.
    """
    same = {"kind": "latents", "family": family.name, "vae": family.fingerprint("vae"), "dtype": _dtype(family.vae)}

    def key(picture: P, version: Version) -> Key:
        return {**same, "how": PIXELS, **_seen(picture, version)}

    def make(picture: P, version: Version) -> Tensor:
        with torch.no_grad():
            return family.encode_images(load(picture, version)[None].to(device))[0]

    return _stored(Shards(folder), pictures, versions, key, make, share, "encoding", "picture")


def cache_masks(
    folder: Path,
    pictures: Sequence[P],
    latent_scale: int,
    load: Callable[[P, int, Version], Tensor | None],
    *,
    versions: Callable[[P], Sequence[Version]] = plain,
    share: Share = ALONE,
) -> Stored:
    """`view.label` of every version of the pictures that have a mask -> [1, H, W] in 0..1.

    Args:
        latent_scale: pixels for one latent.
        load: the mask of a version; None where the picture counts as a whole after all.
    """
    masked = [picture for picture in pictures if picture.mask is not None]
    files = {picture.name: _file(picture.mask) for picture in masked}

    def key(picture: P, version: Version) -> Key:
        whole = [picture.width, picture.height]
        seen = {**_seen(picture, version), "picture": whole, "colours": None}
        return {"kind": "mask", "how": MASK, "mask": files[picture.name], "scale": latent_scale, **seen}

    def make(picture: P, version: Version) -> Tensor:
        mask = load(picture, latent_scale, version)
        width, height = picture.bucket
        return torch.ones(1, height // latent_scale, width // latent_scale) if mask is None else mask

    return _stored(Shards(folder), masked, versions, key, make, share, "reading masks", "mask", suffix=".mask")


def _stored(
    shards: Shards,
    pictures: Sequence[P],
    versions: Callable[[P], Sequence[Version]],
    key: Callable[[P, Version], Key],
    make: Callable[[P, Version], Tensor],
    share: Share,
    what: str,
    unit: str,
    *,
    suffix: str = "",
) -> Stored:
    """What all versions of all pictures have in the shards, once it is there; `suffix` is for the names in them."""

    def named(picture: P, version: Version) -> str:
        return label(picture.name, version.number, mirrored=version.mirrored)

    def fill(part: Sequence[P]) -> None:
        every = ((picture, version) for picture in part for version in versions(picture))
        missing = [(p, v) for p, v in every if digest(key(p, v)) not in shards]
        with Progress(what, len(missing), unit) as progress:
            for picture, version in missing:
                if digest(key(picture, version)) not in shards:  # a copy may have come before
                    shards.add(named(picture, version) + suffix, key(picture, version), {"": make(picture, version)})
                progress.advance()
        shards.flush()

    fill(share.of(pictures))
    share.barrier()
    shards.scan()
    if share.processes > 1:
        fill(pictures)  # what another process has lost
    return Stored(shards, {named(p, v): digest(key(p, v)) for p in pictures for v in versions(p)})


def _seen(picture: Picture, version: Version) -> dict[str, Any]:
    return {
        "picture": picture.sha256,
        "bucket": list(picture.bucket),
        "box": list(version.box),
        "colours": list(version.colours),
        "mirrored": version.mirrored,
    }


def _file(path: Path | None) -> str:
    return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _dtype(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype)
