"""All that a run trains, by name: copied, and put in place for a while."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.loop import Run


def named(run: Run) -> Iterator[tuple[str, nn.Parameter]]:
    """Every trained parameter, as component/name; a name is unique in its component alone."""
    for component, parameters in run.components.items():
        for name, parameter in parameters:
            yield f"{component}/{name}", parameter


def copied(run: Run) -> dict[str, Tensor]:
    """What they hold now."""
    return {name: parameter.detach().clone() for name, parameter in named(run)}


@contextmanager
def replaced(run: Run, values: Mapping[str, Tensor]) -> Generator[None]:
    """Inside, parameters hold `values`; afterwards what they held, to the bit."""
    held = copied(run)
    _fill(run, values)
    try:
        yield
    finally:
        _fill(run, held)


@torch.no_grad()
def _fill(run: Run, values: Mapping[str, Tensor]) -> None:
    for name, parameter in named(run):
        parameter.copy_(values[name])
