"""Parts of a base that no update needs, out of the way in between: a GPU's go to RAM, a CPU's back to their file."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PAGEOUT = 21  # madvise's MADV_PAGEOUT, of Linux 5.4 and newer: what is unchanged since it was read is dropped
CPU = torch.device("cpu")


class Resting:
    """The parts of a base by name, on their device unless they rest.

    On a CPU a part that rests stays usable: its pages go back to the file that they were mapped from, where the system
    can do that, and are read again when they are used. What was freed meanwhile goes back to the system, too: the C
    library keeps it, and encoding pictures frees hundreds of MiB.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._parts = parts
        self._resting: dict[str, torch.device] = {}  # name -> where it belongs

    def rest(self, names: Collection[str]) -> None:
        """These rest from here on, whenever they are not in `awake`; all others do not."""
        self._wake([name for name in self._resting if name not in names])
        self._lay([name for name in names if name not in self._resting])

    @contextmanager
    def awake(self, *names: str) -> Generator[None]:
        """Inside, those of them that rest are on their device; all that rest, where none is named."""
        woken = [name for name in names or self._parts if name in self._resting]
        self._wake(woken)
        try:
            yield
        finally:
            self._lay(woken)

    def _wake(self, names: Collection[str]) -> None:
        for name in names:
            _move(self._parts[name], self._resting.pop(name))

    def _lay(self, names: Collection[str]) -> None:
        for name in names:
            part = self._parts[name]
            device = next(part.parameters()).device
            self._resting[name] = device
            if device.type == "cpu":
                _give_back(part)
            else:
                _move(part, CPU)
        if names:
            _trim()


def _move(part: nn.Module, device: torch.device) -> None:
    nn.Module.to(part, device)  # the libraries' own `to` warns of half precision on a CPU, where nothing is computed


def _give_back(part: nn.Module) -> None:
    give_back((*part.parameters(), *part.buffers()))


def give_back(tensors: Iterable[Tensor]) -> None:
    """Tells the system that the pages of tensors are not needed soon: those of a file can go. A GPU's are left out.

    It may not listen. Nothing is lost: what was changed since it was read stays, or is swapped.
    """
    advise = _of_libc("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if advise is None:
        return
    for tensor in (each for each in tensors if each.device == CPU):
        start = tensor.data_ptr()
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: others are a neighbour's as well
        last = (start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            advise(first, last - first, PAGEOUT)


def _trim() -> None:
    """Gives freed memory back to the system."""
    trim = _of_libc("malloc_trim", ctypes.c_size_t)
    if trim is not None:
        trim(0)


@functools.cache
def _of_libc(name: str, *takes: Any) -> Callable[..., int] | None:
    """A function of the C library; None where it has none of that name, or this is no Linux."""
    if sys.platform != "linux":
        return None
    try:
        found: Any = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    found.argtypes = takes
    return found
