"""Where the args point to: the tree with local paths made absolute, and the tree as files may hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from preprocess import source
from trainer import environment
from trainer.args import (
    CaptionModelArgs,
    DataArgs,
    HooksArgs,
    ModelArgs,
    RegularisationArgs,
    TrainArgs,
    TriggerModelArgs,
)
from trainer.models import sniff

_Model = TypeVar("_Model", CaptionModelArgs, TriggerModelArgs)


def located(args: TrainArgs) -> TrainArgs:
    """The tree with local paths absolute and the family by name, so that it means the same wherever it is fed back."""
    return args.model_copy(
        update={
            "data": args.data.model_copy(
                update={
                    "source": _source(args.data.source),
                    "regularisation": _with_source(args.data.regularisation, _source),
                    "caption_model": _nearby(args.data.caption_model),
                    "trigger_model": _nearby(args.data.trigger_model),
                    **_models_nearby(args.data),
                }
            ),
            "hooks": _hooks_nearby(args.hooks),
            "model": found(args.model),
            "adapter": args.adapter.model_copy(
                update={"start": args.adapter.start and environment.located(args.adapter.start)}
            ),
        }
    )


def found(model: ModelArgs) -> ModelArgs:
    config = environment.located(model.config) if model.config else None
    merge = {environment.located(file): strength for file, strength in model.merge.items()}
    given = {"base": environment.located(model.base), "config": config, "merge": merge}
    return sniff.named(model.model_copy(update=given))


def _hooks_nearby(hooks: HooksArgs) -> HooksArgs:
    given = hooks.teacher.model_dump(include={"base", "config"}, exclude_none=True)
    paths = {name: environment.located(path) for name, path in given.items()}
    best = hooks.best.model_copy(update=_base(hooks.best.base))
    return hooks.model_copy(update={"teacher": hooks.teacher.model_copy(update=paths), "best": best})


def kept(args: TrainArgs) -> TrainArgs:
    """The tree as files may hold it: a URL's query may be a key. What was read with it is in the run's own cache."""
    kept = {
        "source": source.kept(args.data.source),
        "regularisation": _with_source(args.data.regularisation, source.kept),
    }
    return args.model_copy(update={"data": args.data.model_copy(update=kept)})


def _source(given: str) -> str:
    return source.each(given, environment.located)


def _with_source(regular: RegularisationArgs, changed: Callable[[str], str]) -> RegularisationArgs:
    return regular if regular.source is None else regular.model_copy(update={"source": changed(regular.source)})


def _nearby(options: _Model) -> _Model:
    given = options.model_dump(include={"base", "vocabulary"}, exclude_none=True)
    return options.model_copy(update={name: environment.located(path) for name, path in given.items()})


def _models_nearby(data: DataArgs) -> dict[str, Any]:
    """The sections that name models for masks and for upscaling, with local paths made absolute."""
    mask = data.mask
    parts = {
        name: part.model_copy(update=_base(part.base))
        for name, part in (("detect", mask.detect), ("person", mask.person))
    }
    return {
        "mask": mask.model_copy(update={**_base(mask.base), **parts}),
        "upscale": data.upscale.model_copy(update=_base(data.upscale.base)),
    }


def _base(given: str | None) -> dict[str, str]:
    return {} if given is None else {"base": environment.located(given)}
