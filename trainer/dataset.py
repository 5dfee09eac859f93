"""The dataset: dataset.jsonl -> items, and an index -> a micro-batch, the same for ever.

Shapes: B pictures, C latent channels, H W latent height and width; h w pixels.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn

from trainer.seed import derive
from trainer.types import Samples
from trainer.view import PLAIN, Augment, Version, label, sizes

log = logging.getLogger(__name__)


class DatasetError(ValueError):
    """The manifest cannot be used. One sentence that says which line and why."""


@dataclass(frozen=True)
class Item:
    """One picture of dataset.jsonl."""

    file: Path
    name: str  # unique; names cache files and messages
    sha256: str  # of the picture file
    caption: str
    mask: Path | None
    width: int  # pixels of the picture as it is
    height: int
    bucket: tuple[int, int]  # (width, height) in pixels that it is trained at
    centering: tuple[float, float] = (0.5, 0.5)  # share of what is cut off that goes left, at the top
    folder: str = "."  # of the file that it came from, relative to the source
    captions: tuple[str, ...] = ()  # where it has several, of which `caption` is the first: one is drawn each time
    trigger: str = ""  # of the concept that it shows, where the manifest says so
    regular: bool = False  # one of the regularisation set, which shows no concept
    original: tuple[int, int] | None = None  # (width, height) before a model enlarged it; None where none did


def read_manifest(path: Path) -> list[Item]:
    """The items of dataset.jsonl; relative paths start at its folder."""
    items: list[Item] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line), path.parent))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{path}, line {number} is no picture record: {error!r}") from error
    doubles = [name for name, count in Counter(item.name for item in items).items() if count > 1]
    if doubles:
        raise DatasetError(f"{path} uses a name for more than one picture: {', '.join(doubles)}")
    return items


def _item(record: Mapping[str, Any], root: Path) -> Item:
    width, height = record["bucket"]
    mask = record["mask"]
    left, top = record.get("centering", (0.5, 0.5))
    original = record.get("original")
    return Item(
        file=root / record["file"],
        name=str(record["name"]),
        sha256=str(record["sha256"]),
        caption=str(record["caption"]),
        mask=None if mask is None else root / mask,
        width=int(record["width"]),
        height=int(record["height"]),
        bucket=(int(width), int(height)),
        centering=(float(left), float(top)),
        folder=str(PurePosixPath(record.get("source", "")).parent),
        captions=tuple(str(caption) for caption in record.get("captions", ())),
        trigger=str(record.get("trigger", "")),
        regular=bool(record.get("regular", False)),
        original=None if original is None else (int(original[0]), int(original[1])),
    )


def load_pixels(item: Item, version: Version | None = None) -> Tensor:
    """[3, h, w] float32 in -1..1: the version's box (plain: as much as covers the bucket) scaled to the bucket.

    Colours change in the order of `Version.colours`, mirroring comes last.
    """
    version = version or PLAIN.version(item)
    with Image.open(item.file) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    if upright.size != (item.width, item.height):
        raise DatasetError(
            f"the picture {item.file.name} is {upright.size[0]}x{upright.size[1]} pixels, but dataset.jsonl says "
            f"{item.width}x{item.height}; it was changed after preprocessing: start a new run"
        )
    fitted = upright.resize(item.bucket, Image.Resampling.LANCZOS, box=version.box)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, factor in zip(kinds, version.colours, strict=True):
        fitted = fitted if factor == 1 else kind(fitted).enhance(factor)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0
    return pixels.flip(-1) if version.mirrored else pixels


def load_mask(item: Item, latent_scale: int, version: Version | None = None) -> Tensor | None:
    """[1, H, W] in 0..1, cropped and mirrored like the picture, averaged over each latent; None without a mask.

    A mask that is black inside the crop says nothing to learn from: it is named in the log and left out.
    """
    if item.mask is None:
        return None
    version = version or PLAIN.version(item)
    with Image.open(item.mask) as picture:
        upright = ImageOps.exif_transpose(picture).convert("L")
    if upright.size != (item.width, item.height):
        raise DatasetError(
            f"the mask {item.mask.name} is {upright.size[0]}x{upright.size[1]} pixels, "
            f"but its picture is {item.width}x{item.height}; they must be of one size"
        )
    fitted = upright.resize(item.bucket, Image.Resampling.BILINEAR, box=version.box)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32))[None] / 255.0
    mask = nn.functional.avg_pool2d(pixels.flip(-1) if version.mirrored else pixels, latent_scale)
    if not bool(mask.any()):
        log.warning("the mask of %s is empty: the whole picture counts", label(item.name, version.number))
        return None
    return mask


class Dataset:
    """Index -> micro-batch, a pure function of (items, seed, index). A batch never mixes buckets.

    Batches are always full. In a *round* of `batch_size` epochs each bucket of n pictures makes exactly n batches,
    so every picture is seen equally often, and once in each epoch of its bucket. Each epoch has an order of its own.
    """

    def __init__(
        self,
        items: Sequence[Item],
        latents: Mapping[str, Tensor],
        *,
        batch_size: int,
        seed: int,
        caption_dropout: float = 0.0,
        flip: Container[str] | None = None,
        augment: Augment = PLAIN,
        masks: Mapping[str, Tensor] | None = None,
        priors: Mapping[str, Sequence[str]] | None = None,
        weights: Mapping[str, float] | None = None,
        tags: Tags | None = None,
        triggers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep what batches are made of.

        Args:
            latents: `view.label` of each version of each picture -> [C, H, W].
            flip: names of the pictures that are mirrored half of the time.
            augment: the versions of a picture; each is as likely at each showing.
            masks: label of each version -> [1, H, W], not mirrored, for the pictures that have one.
            priors: picture name -> its caption with each class word for the trigger; one is drawn for each batch.
            weights: picture name -> factor of its loss.
            tags: what happens to the parts of a caption at each showing; None leaves them as they are.
            triggers: picture name -> the word for its concept, "" for none; None where nobody asks.
        """
        self._weights, self._tags, self._triggers = weights, tags, triggers
        if not items:
            raise DatasetError("there are no pictures to train on")
        self._items = list(items)
        self._regular = any(item.regular for item in self._items)
        self._latents, self._flip, self._masks, self._priors = latents, flip or (), masks, priors
        self._augment = augment
        self._batch_size, self._seed, self._caption_dropout = batch_size, seed, caption_dropout
        buckets: dict[tuple[int, int], list[int]] = {}
        for index, item in enumerate(self._items):
            buckets.setdefault(item.bucket, []).append(index)
        self._buckets = [buckets[size] for size in sorted(buckets)]
        self._plan: tuple[int, list[list[int]]] | None = None  # the last round, which index computes anew at will

    def __len__(self) -> int:
        """Pictures."""
        return len(self._items)

    def micro(self, index: int) -> Samples:
        """Micro-batch `index`, 0 and up."""
        round_, position = divmod(index, len(self._items))
        chosen = [self._items[i] for i in self._round(round_)[position]]
        generator = torch.Generator().manual_seed(derive(self._seed, "micro", index))
        drop = torch.rand(len(chosen), generator=generator) < self._caption_dropout
        halves = torch.rand(len(chosen), generator=generator) < 0.5
        shown = [self._version(item, index, row, bool(halves[row])) for row, item in enumerate(chosen)]
        pairs = list(zip(chosen, shown, strict=True))
        latents = [self._latents[label(item.name, v.number, mirrored=v.mirrored)] for item, v in pairs]
        captions = [_drawn(item, derive(self._seed, "caption", index, row)) for row, item in enumerate(chosen)]
        if self._tags is not None:
            captions = [
                varied(caption, self._tags, item.trigger, self._tags_seed(self._tags, item, index, row))
                for row, (caption, item) in enumerate(zip(captions, chosen, strict=True))
            ]
        return Samples(
            latents=torch.stack(latents),
            captions=tuple("" if d else caption for caption, d in zip(captions, drop, strict=True)),
            names=tuple(item.name for item in chosen),
            mask=self._mask(pairs, latents),
            sizes=torch.tensor([sizes(*pair) for pair in pairs], dtype=torch.float32),
            prior=self._prior(chosen, generator),
            triggers=() if self._triggers is None else tuple(self._triggers[item.name] for item in chosen),
            weight=None if self._weights is None else torch.tensor([self._weights[item.name] for item in chosen]),
        )

    def _round(self, round_: int) -> list[list[int]]:
        """The batches of a round, as item indices: n * batch_size pictures make n batches."""
        if self._plan is not None and self._plan[0] == round_:
            return self._plan[1]
        queues = [self._queue(bucket, members, round_) for bucket, members in enumerate(self._buckets)]
        turns = [bucket for bucket, members in enumerate(self._buckets) for _ in members]
        order = _permutation(len(turns), derive(self._seed, "turns", round_))
        batches = [next(queues[turns[i]]) for i in order]
        self._plan = round_, batches
        return batches

    def _queue(self, bucket: int, members: Sequence[int], round_: int) -> Iterator[list[int]]:
        """The batches of one bucket: batch_size epochs end to end, cut into batches."""
        size = self._batch_size
        stream: list[int] = []
        for epoch in range(round_ * size, (round_ + 1) * size):
            seed = derive(self._seed, "epoch", bucket, epoch)
            order = self._spread(members, seed) if self._regular else _permutation(len(members), seed)
            stream += [members[i] for i in order]
        return iter([stream[start : start + size] for start in range(0, len(stream), size)])

    def _spread(self, members: Sequence[int], seed: int) -> list[int]:
        """An order of the members that spreads each picture's showings over the epoch, each at random in its part.

        With a regularisation set an epoch is long and shows each picture of a concept many times.
        """
        names = [self._items[i].name for i in members]
        showings, before = Counter(names), Counter[str]()
        at: list[float] = []
        generator = torch.Generator().manual_seed(seed)
        for name, chance in zip(names, torch.rand(len(names), generator=generator).tolist(), strict=True):
            at.append((before[name] + chance) / showings[name])
            before[name] += 1
        return sorted(range(len(members)), key=at.__getitem__)

    def _prior(self, chosen: Sequence[Item], generator: torch.Generator) -> tuple[str, ...]:
        if self._priors is None:
            return ()
        captions = [self._priors[item.name] for item in chosen]
        return tuple(c[int(torch.randint(len(c), (), generator=generator))] for c in captions)

    def _version(self, item: Item, index: int, row: int, half: bool) -> Version:
        """The version that is shown in this place."""
        number = 0
        if self._augment.variants:
            generator = torch.Generator().manual_seed(derive(self._seed, "version", index, row))
            number = int(torch.randint(self._augment.variants + 1, (), generator=generator))
        return self._augment.version(item, number, mirrored=half and item.name in self._flip)

    def _tags_seed(self, tags: Tags, item: Item, index: int, row: int) -> int:
        """What decides how the caption in this place is varied: the place, or one of the picture's few variants."""
        place = derive(self._seed, "tags", index, row)
        if not tags.variants:
            return place
        number = int(torch.randint(tags.variants, (), generator=torch.Generator().manual_seed(place)))
        return _variant_seed(self._seed, item, number)

    def _mask(self, pairs: Sequence[tuple[Item, Version]], latents: Sequence[Tensor]) -> Tensor | None:
        """[B, 1, H, W], ones for a picture without a mask; None when no picture of the dataset has one."""
        if not self._masks:
            return None
        rows: list[Tensor] = []
        for (item, version), latent in zip(pairs, latents, strict=True):
            mask = self._masks.get(label(item.name, version.number))
            if mask is None:
                mask = torch.ones(1, *latent.shape[1:])
            rows.append(mask.flip(-1) if version.mirrored else mask)
        return torch.stack(rows)


def _permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Tags:
    """What happens at each showing to what commas part in a caption."""

    keep: int = 1  # first parts that nothing happens to
    shuffle: bool = False
    dropout: float = 0.0  # share of the other parts that is left out
    variants: int = 0  # forms of a caption that are drawn from; 0 makes a new one each time


def varied(caption: str, tags: Tags, trigger: str, seed: int) -> str:
    """The caption of one showing, a pure function of its arguments. A part that names the trigger is never left out."""
    parts = [part.strip() for part in caption.split(",")]
    first, rest = parts[: tags.keep], parts[tags.keep :]
    if tags.shuffle:
        rest = [rest[i] for i in _permutation(len(rest), seed)]
    if tags.dropout:
        drawn = torch.rand(len(rest), generator=torch.Generator().manual_seed(derive(seed, "tag dropout")))
        named = re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)") if trigger else None
        rest = [
            part
            for part, chance in zip(rest, drawn.tolist(), strict=True)
            if chance >= tags.dropout or (named is not None and named.search(part))
        ]
    return ", ".join([*first, *rest])


def forms(item: Item, tags: Tags | None, seed: int) -> list[str]:
    """Every caption that the picture can be shown with, dropout aside.

    Args:
        tags: with variants, or None: without a bound on them there are too many.
        seed: the dataset's.
    """
    captions = item.captions or (item.caption,)
    if tags is None:
        return list(captions)
    seeds = [_variant_seed(seed, item, number) for number in range(tags.variants)]
    return [varied(caption, tags, item.trigger, variant) for caption in captions for variant in seeds]


def _variant_seed(seed: int, item: Item, number: int) -> int:
    return derive(seed, "caption variant", item.sha256, number)


def _drawn(item: Item, seed: int) -> str:
    """The caption of this showing: with several each is as likely."""
    if len(item.captions) < 2:
        return item.caption
    return item.captions[int(torch.randint(len(item.captions), (), generator=torch.Generator().manual_seed(seed)))]
