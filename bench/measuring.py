"""How speed is measured: seconds of a CPU or GPU, in turns, medians and quartiles; and how fast the machine can be."""

from __future__ import annotations

import contextlib
import ctypes
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Figures = dict[str, Any]
Ways = Mapping[str, Callable[[], object]]


def interleaved(ways: Ways, rounds: int, *, warm: int = 1, device: str = "cpu") -> dict[str, Figures]:
    """Each way once a round, so that what slows the machine slows all of them; the first rounds only warm up.

    Of a GPU the seconds are those until it has done all that it was given.
    """
    spent: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm + rounds):
        for name, once in ways.items():
            _wait(device)
            began, at = time.process_time(), time.perf_counter()
            once()
            _wait(device)
            if turn >= warm:
                wall[name].append(time.perf_counter() - at)
                spent[name].append(time.process_time() - began if device == "cpu" else wall[name][-1])
    return {name: {**spread(spent[name], device), "wall_s": _rounded(statistics.median(wall[name]))} for name in ways}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float], device: str = "cpu") -> Figures:
    """Median and quartiles of seconds, which say whose they are, and each round's."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    of = "cpu_s" if device == "cpu" else "gpu_s"
    each = [_rounded(value) for value in values]
    return {of: _rounded(middle), "quartiles": [_rounded(low), _rounded(high)], "rounds": len(values), "each": each}


def seconds(figures: Figures) -> float:
    """The median, whosever seconds they are."""
    return figures["cpu_s"] if "cpu_s" in figures else figures["gpu_s"]


def ratio(figures: Mapping[str, Figures], of: str, to: str) -> float:
    """The median of the rounds' own ratios: what slowed the machine in a round slowed both ways.

    Older results did not keep their rounds, and have the ratio of medians.
    """
    one, other = figures[of], figures[to]
    rounds = zip(one.get("each", ()), other.get("each", ()), strict=True)
    ratios = [a / b for a, b in rounds] or [seconds(one) / seconds(other)]
    return round(statistics.median(ratios), 3)


def rates(dtype: torch.dtype, repeats: int = 3, device: str = "cpu") -> dict[str, float]:
    """Thousand million floating-point operations a second of single large kernels, each at its best.

    Those of a GPU are larger: it needs more at once to be busy.
    """
    found: dict[str, float] = {}
    wider = 1 if device == "cpu" else 4

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    for m, k, n in ((2048, 2048, 2048), (1024, 1280, 5120), (4096, 640, 2560)):
        m, k, n = wider * m, wider * k, wider * n
        a, b = drawn(m, k), drawn(n, k)
        work = 2 * m * k * n
        found[f"linear {m}x{k}x{n}"] = _best(lambda a=a, b=b: F.linear(a, b), work, repeats, device)
    for channels, side in ((320, 64), (640, 32)):
        x, w = drawn(wider, channels, side, side), drawn(channels, channels, 3, 3)
        work = wider * 2 * 9 * channels**2 * side**2
        name = f"conv 3x3 {channels}x{side}x{side}" + (f", batch {wider}" if wider > 1 else "")
        found[name] = _best(lambda x=x, w=w: F.conv2d(x, w, padding=1), work, repeats, device)
    return found


@torch.no_grad()
def _best(kernel: Callable[[], object], work: float, repeats: int, device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    kernel()
    took: list[float] = []
    for _ in range(repeats):
        _wait(device)
        began = clock()
        kernel()
        _wait(device)
        took.append(clock() - began)
    return round(work / min(took) / 1e9, 1)


class Memory:
    """MiB of this process in RAM, or of a GPU by torch; zeros where the system does not tell."""

    def __init__(self, device: str = "cpu") -> None:
        self._gpu = device == "cuda"

    def now(self) -> int:
        return torch.cuda.memory_allocated() // 2**20 if self._gpu else _status("VmRSS")

    def peak(self) -> int:
        """The most since the process began, or since `forget`."""
        return torch.cuda.max_memory_allocated() // 2**20 if self._gpu else _status("VmHWM")

    def forget(self) -> None:
        """Gives freed memory back to the system; from here on the peak is counted anew. Where the system can."""
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        refs = Path("/proc/self/clear_refs")
        if refs.exists():
            refs.write_text("5", encoding="utf-8")


def _status(name: str) -> int:
    status = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text("utf-8"), re.MULTILINE) if status.exists() else None
    return int(found[1]) // 1024 if found else 0


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
