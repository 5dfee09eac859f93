"""One update, in which what has rate 0 stays as it is; averages that an optimizer keeps, put in for a while."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@runtime_checkable
class HasAverages(Protocol):
    """A schedule-free optimizer: it trains one point, and what it has found is an average (arXiv 2405.15682)."""

    def train(self) -> None: ...
    def eval(self) -> None: ...


def step(optimizer: Optimizer) -> None:
    """One update of what has a gradient and a rate; everything else stays as it is to the last bit.

    That holds whatever the optimizer does about momentum, decay or averages: some move parameters at rate 0.
    """
    parameters = _parameters(optimizer)
    if not any(parameter.grad is not None for parameter in parameters):
        return
    still = [p for group in optimizer.param_groups for p in group["params"] if group["lr"] == 0 or p.grad is None]
    before = [parameter.detach().clone() for parameter in still]
    optimizer.step()
    _put(before, still)


@contextmanager
def evaluated(optimizers: Iterable[Optimizer]) -> Generator[None]:
    """Inside, parameters are what the optimizers have found; afterwards they are to the bit what is being trained."""
    averaging = [optimizer for optimizer in optimizers if isinstance(optimizer, HasAverages)]
    parameters = [parameter for optimizer in averaging for parameter in _parameters(optimizer)]
    before = [parameter.detach().clone() for parameter in parameters]
    for optimizer in averaging:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in averaging:
            optimizer.train()
        _put(before, parameters)  # there and back again rounds


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def _put(values: Iterable[Tensor], parameters: Iterable[nn.Parameter]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
