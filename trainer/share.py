"""Which part of the work is this process's, where several processes (on several machines) make one run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


def _nobody() -> None:
    """The barrier of one that is alone."""


@dataclass(frozen=True)
class Share:
    """Process `rank` of `processes` that see the same folders."""

    rank: int = 0
    processes: int = 1
    barrier: Callable[[], None] = _nobody  # returns when all processes have called it
    here: int = 1  # processes of this run on this machine, which share its cores

    @property
    def first(self) -> bool:
        """Whether this process writes what there is only one of."""
        return self.rank == 0

    def of(self, work: Sequence[_T]) -> Sequence[_T]:
        """Every `processes`-th piece of the work: the parts of all ranks together are the whole."""
        return work[self.rank :: self.processes]

    @contextmanager
    def first_alone(self) -> Generator[None]:
        """The first process goes through what is inside before the others, who find what it made."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()


ALONE = Share()
