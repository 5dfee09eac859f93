"""What a run is shown, from args and pictures: a dataset with its caches, and captions as the denoiser reads them."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from trainer import cache, concepts, mixture
from trainer.args import DataArgs, TrainArgs
from trainer.dataset import Dataset, Item, Tags, forms, load_mask, load_pixels
from trainer.rundir import RunDir
from trainer.seed import derive
from trainer.share import Share
from trainer.types import Cond, ModelFamily
from trainer.view import Augment

log = logging.getLogger(__name__)


class MaterialError(ValueError):
    """Masks or captions that would leave an option nothing to do. One sentence."""


SIMILAR = 64  # pictures whose mean the similarity start approaches, at most: more hardly move it


def dataset(
    args: TrainArgs,
    run_dir: RunDir,
    family: ModelFamily,
    device: torch.device,
    items: Sequence[Item],
    share: Share,
) -> Dataset:
    """The dataset of resolved args. What is missing of its latents and masks is made; each process makes its share.

    Raises:
        MixtureError, ConceptError, MaterialError: an option does not fit the pictures there are.
    """
    regular = args.data.regularisation
    shown = mixture.repeated(items, args.data.repeats, balance=args.data.balance, ratio=regular.ratio)
    weights = mixture.weights(items, args.data.weights, regular.weight)
    priors = concepts.priors(args.data, items) if args.objective.prior_weight else None
    augment = Augment(**args.data.augment.model_dump(), seed=args.runtime.seed)
    flip = flipped(args.data, items)
    folder = run_dir.cache / "latents"
    latents = cache.cache_latents(
        folder,
        items,
        family,
        load_pixels,
        device,
        versions=lambda item: augment.versions(item, mirrored=item.name in flip),
        share=share,
    )
    masks = (
        cache.cache_masks(folder, items, family.latent_scale, load_mask, versions=augment.versions, share=share)
        if args.data.masks
        else None
    )
    if masks is not None:
        _check_masks(items, masks)
    triggers = None
    if args.objective.attention.weight:
        triggers = {item.name: concepts.trigger_of(item, args.data) for item in items}
        _check_triggers(items, triggers, family)
    return Dataset(
        shown,
        latents,
        batch_size=args.runtime.batch_size,
        seed=args.runtime.seed,
        caption_dropout=args.data.caption_dropout,
        flip=flip,
        augment=augment,
        masks=masks,
        priors=priors,
        weights=weights,
        tags=_tags(args.data),
        triggers=triggers,
    )


def _check_masks(items: Sequence[Item], masks: Mapping[str, Tensor]) -> None:
    """MaterialError where every picture counts as a whole: then masks do nothing."""
    own = [item for item in items if not item.regular]
    bare = [item for item in own if item.mask is None]
    if all(bool((mask == 1).all()) for mask in masks.values()):  # a black one was made white: it counts as none
        raise MaterialError(
            f"data.masks is on, but every picture would count as a whole: {len(bare)} of {len(own)} have no mask, and "
            "the masks of the others are all white or all black inside the crop; give masks that show a part, name "
            "others in data.mask.sources, or turn it off (--no-data.masks)"
        )


def _check_triggers(items: Sequence[Item], triggers: Mapping[str, str], family: ModelFamily) -> None:
    """Names the pictures that objective.attention does nothing for; MaterialError where that is every one."""
    own = [item for item in items if not item.regular]
    texts = [(item.name, caption) for item in own for caption in item.captions or (item.caption,)]
    there = family.token_places([text for _, text in texts], [triggers[name] for name, _ in texts]).any(1).tolist()
    named = {name for (name, _), found in zip(texts, there, strict=True) if found}
    idle = [item.name for item in own if item.mask is None or item.name not in named]
    if len(idle) == len(own):
        raise MaterialError(
            f"objective.attention.weight is given, but no picture has both a mask and its trigger in its caption "
            f"({sum(item.mask is not None for item in own)} have a mask, {len(named)} the trigger, of {len(own)}); "
            "add what is missing, or leave objective.attention out"
        )
    if idle:
        log.warning(
            "%d of %d pictures lack a mask, or their trigger in the caption, and objective.attention does nothing for "
            "them: %s",
            len(idle),
            len(own),
            _some(idle),
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _tags(data: DataArgs) -> Tags | None:
    return Tags(data.keep_tags, data.shuffle_tags, data.tag_dropout, data.caption_variants) if data.varied else None


def flipped(data: DataArgs, items: Sequence[Item]) -> frozenset[str]:
    """The names of the pictures that are mirrored half of the time; those that are kept as they are go to the log."""
    if not data.flip:
        return frozenset()
    sided = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, data.keep_sides))})(?!\w)", re.IGNORECASE)
    kept = [
        item.name
        for item in items
        if data.keep_sides and any(sided.search(caption) for caption in (item.caption, *item.captions))
    ]
    if kept:
        log.info("never mirrored, as a caption has a word of data.keep_sides: %s", _some(kept))
    return frozenset(item.name for item in items) - frozenset(kept)


def encoder(
    args: TrainArgs,
    run_dir: RunDir,
    family: ModelFamily,
    device: torch.device,
    items: Sequence[Item],
    share: Share,
) -> Callable[[Sequence[str]], Cond]:
    """Captions -> Cond: live only while rows are trained, or while captions are hardly ever the same; else cached."""
    if args.text.tokens or args.adapter.text.train or (args.data.varied and not args.data.caption_variants):
        return family.encode
    text = cache.TextCache(run_dir.cache / "text", family, device)
    priors = concepts.priors(args.data, items) if args.objective.prior_weight else {}
    own = (form for item in items for form in forms(item, _tags(args.data), args.runtime.seed))
    dropped = [""] if args.data.caption_dropout else []
    captions = list(dict.fromkeys([*own, *(caption for some in priors.values() for caption in some), *dropped]))
    if not args.data.varied or len(captions) <= _showings(args) * share.processes:  # else many are never shown
        text.prepare(captions, share)
    return text


def _showings(args: TrainArgs) -> int:
    """Pictures that one process is shown in the run."""
    return (args.runtime.steps or 0) * args.runtime.accumulate * args.runtime.batch_size


@dataclass(frozen=True)
class Loaded(Sequence[Tensor]):
    """The pixels of pictures, each read when it is asked for."""

    items: Sequence[Item]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Loaded: ...
    def __getitem__(self, index: int | slice) -> Tensor | Loaded:
        return Loaded(self.items[index]) if isinstance(index, slice) else load_pixels(self.items[index])


def similar(items: Sequence[Item], seed: int) -> Loaded:
    """The pictures that the similarity start looks at, in their order: all, or SIMILAR that the seed chooses."""
    if len(items) <= SIMILAR:
        return Loaded(items)
    chosen = random.Random(derive(seed, "similar")).sample(range(len(items)), SIMILAR)
    return Loaded([items[place] for place in sorted(chosen)])
