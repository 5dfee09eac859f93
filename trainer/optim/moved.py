"""Whether everything that was trained has moved: a tensor that never does was trained for nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.optim.rates import Rates

Components = Mapping[str, Sequence[tuple[str, nn.Parameter]]]

# Fewer updates than this prove nothing: the A of a LoRA has no gradient before B has moved, and rows have none while
# captions are dropped.
ENOUGH = 10


class NeverMoved(RuntimeError):  # noqa: N818  it names what happened
    """Tensors that the run trained are, to the last bit, what they were before it."""


def marks(components: Components) -> dict[tuple[str, str], str]:
    """(component, name) -> digest of each trained tensor: as much memory as names, however large the tensors."""
    return {(component, name): _mark(p) for component, named in components.items() for name, p in named}


def updates(optimizers: Mapping[str, Optimizer], rates: Mapping[str, Rates], done: int) -> dict[tuple[str, str], int]:
    """(component, name) -> how many of the run's first `done` updates had a rate above 0 for it."""
    return {
        (component, name): rates[component].updates(group["rule"], done)
        for component, optimizer in optimizers.items()
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def check(before: Mapping[tuple[str, str], str], components: Components, live: Mapping[tuple[str, str], int]) -> None:
    """Compares with what was there before the run.

    Args:
        live: of `updates`; tensors with less than ENOUGH are let pass.

    Raises:
        NeverMoved: names the tensors.
    """
    now = marks(components)
    stuck = [at[1] for at, mark in now.items() if mark == before[at] and live[at] >= ENOUGH]
    if stuck:
        more = f" and {len(stuck) - 10} more" if len(stuck) > 10 else ""
        raise NeverMoved(
            f"{len(stuck)} of {len(now)} trained tensors never moved: {', '.join(stuck[:10])}{more}. Their gradient "
            "was 0 all along (nothing that the loss sees depends on them, or their pictures were never shown), or the "
            "rate is too small for their precision. What was exported holds them as they were; leave them out of what "
            "is trained, or raise the rate"
        )


def _mark(parameter: Tensor) -> str:
    values = parameter.detach().cpu().contiguous() + 0.0  # -0 and 0 are one value
    return hashlib.sha256(values.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
