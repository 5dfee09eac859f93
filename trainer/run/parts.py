"""The parts that args name: their classes, and the adapters made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from preprocess import maskers, stages, upscalers
from preprocess.captioners import CAPTIONERS
from trainer import concepts, layouts, material, optim, registry
from trainer.adapters import ADAPTERS
from trainer.adapters.layered import Layers
from trainer.adapters.textual_inversion import Concept, TextualInversion
from trainer.args import TrainArgs
from trainer.dataset import Item
from trainer.hooks import compose
from trainer.models import FAMILIES
from trainer.objectives import OBJECTIVES
from trainer.run.error import RunError
from trainer.seed import derive
from trainer.types import Adapter, ModelFamily


@dataclass(frozen=True)
class Parts:
    """The classes that the args name, found before anything is loaded or written."""

    family: Any
    adapter: Any  # None for adapter.kind none
    objective: Any
    hooks: tuple[compose.Chosen, ...]


def check_names(args: TrainArgs, *, code: bool) -> None:
    """Refuses what names no part of preprocessing and no optimizer, in milliseconds, before the base is looked at."""
    registry.load(CAPTIONERS, args.data.captioner, "data.captioner", code=code)  # the stage makes it anew
    for name in args.data.mask.sources if args.data.masks else ():
        maskers.kind(name, code=code)
    upscalers.kind(args.data.upscale.by, code=code)
    optim.check(args.optim, code=code)
    stages.chain(args.data.stages, code=code)


def chosen(args: TrainArgs, *, code: bool) -> Parts:
    """Found by their names; a hook's options are checked, nothing is made.

    Raises:
        PartError: a name is no part's, or would import code where `code` is False.
    """
    adapter = args.adapter.kind
    return Parts(
        family=registry.load(FAMILIES, args.model.family, "model.family", code=code),
        adapter=None if adapter == "none" else registry.load(ADAPTERS, adapter, "adapter.kind", code=code),
        objective=registry.load(OBJECTIVES, args.objective.kind, "objective.kind", code=code),
        hooks=compose.chosen(args.hooks, code=code),
    )


def all_adapters(args: TrainArgs, items: Sequence[Item], parts: Parts) -> list[Adapter]:
    """The rows of learned triggers, if any, then the adapters on layers."""
    rows = TextualInversion(args.text, _learned(args, items), args.runtime.seed) if args.text.tokens else None
    return [*([rows] if rows else []), *layered(args, parts)]


def layered(args: TrainArgs, parts: Parts) -> list[Adapter]:
    """The adapters on layers: the denoiser's, then the text encoders'."""
    if parts.adapter is None:
        return []
    adapters: list[Adapter] = [parts.adapter(args.adapter, args.runtime.seed)]
    if args.adapter.text.train:
        adapters.append(parts.adapter(args.adapter.for_text(), derive(args.runtime.seed, "text"), "text"))
    return adapters


def _learned(args: TrainArgs, items: Sequence[Item]) -> list[Concept]:
    """What gets vectors: each trigger that pictures show. The first concept of a trigger says its init_words."""
    learned: list[Concept] = []
    own = [item for item in items if not item.regular]
    for trigger in dict.fromkeys(concepts.trigger_of(item, args.data) for item in own):
        of = [item for item in own if concepts.trigger_of(item, args.data) == trigger]
        words = [c.init_words for c in args.data.concepts.values() if c.trigger == trigger and c.init_words]
        pictures = material.similar(of, args.runtime.seed) if args.text.init == "similarity" else ()
        learned.append(Concept(trigger, words[0] if words else None, pictures))
    return learned


def begin(args: TrainArgs, family: ModelFamily, adapters: Sequence[Adapter]) -> None:
    """Puts what adapter.start names into the adapters, all of it.

    Raises:
        RunError: the file cannot be read for this base, or holds updates of parts that are not trained.
    """
    if args.adapter.start is None:
        return
    try:
        updates = layouts.read(args.adapter.start, family)
    except layouts.LayoutError as error:
        raise RunError(f"adapter.start: {error}") from error
    if not args.adapter.text.train and any(component != "denoiser" for component, _ in updates):
        raise RunError(f"adapter.start {args.adapter.start} has updates of text encoders; turn adapter.text.train on")
    for adapter in adapters:
        if isinstance(adapter, Layers):
            adapter.begin(updates)


def constrain(adapters: Sequence[Adapter], optimizers: Mapping[str, Optimizer]) -> None:
    """Has limits of updates hold after each of an optimizer's steps."""
    for adapter in adapters:
        if isinstance(adapter, Layers):
            optimizers[adapter.component].register_step_post_hook(_constraining(adapter))


def _constraining(adapter: Layers) -> Callable[[Optimizer, Any, Any], None]:
    return lambda optimizer, args, kwargs: adapter.constrain()
