"""Args with every value that follows from others, from the base or from the pictures filled in."""

from __future__ import annotations

from collections.abc import Sequence

from trainer import concepts, optim
from trainer.args import AdapterArgs, DataArgs, TrainArgs
from trainer.dataset import Item
from trainer.run.error import RunError
from trainer.types import ModelFamily


def resolve(args: TrainArgs, family: ModelFamily, items: Sequence[Item], pace: float = 1.0) -> TrainArgs:
    """The tree with every derived value filled in; resolving it again changes nothing.

    Args:
        pace: that of the kind of adapter (`Layers.pace`).
    """
    data = concepts.filled(args.data, items)
    try:
        prompts = concepts.prompts(args.sample.prompts, data, items, args.sample.pictures)
    except concepts.ConceptError as error:
        raise RunError(str(error)) from error
    return args.model_copy(
        update={
            "adapter": args.adapter.model_copy(update={"alpha": _alpha(args.adapter)}),
            "data": data.model_copy(update={"resolution": args.data.resolution or (family.resolution,)}),
            "optim": optim.filled(args.optim, _trained(args), family.widths, pace),
            "runtime": args.runtime.model_copy(update={"steps": args.runtime.updates(_counted(args.data, items))}),
            "sample": args.sample.model_copy(update={"prompts": prompts}),
        }
    )


def _trained(args: TrainArgs) -> set[str]:
    """The components."""
    layers, text = args.adapter.kind != "none", args.adapter.text.train
    parts = {"rows": args.text.tokens > 0, "adapter": layers, "text": layers and text}
    return {name for name, is_there in parts.items() if is_there}


def _alpha(adapter: AdapterArgs) -> float | None:
    return adapter.alpha or (float(adapter.rank) if adapter.scaled_by_alpha else None)


def _counted(data: DataArgs, items: Sequence[Item]) -> int:
    """Pictures of concepts, and those of the regularisation set that go with them."""
    return data.regularisation.showings(sum(not item.regular for item in items))
