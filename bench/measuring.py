"""How speed is measured: CPU time of this process, in turns, medians and quartiles; and how fast the machine can be."""

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


def interleaved(ways: Ways, rounds: int, *, warm: int = 1) -> dict[str, Figures]:
    """Each way once a round, so that what slows the machine slows all of them; the first rounds only warm up."""
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm + rounds):
        for name, once in ways.items():
            began, at = time.process_time(), time.perf_counter()
            once()
            if turn >= warm:
                cpu[name].append(time.process_time() - began)
                wall[name].append(time.perf_counter() - at)
    return {name: {**spread(cpu[name]), "wall_s": _rounded(statistics.median(wall[name]))} for name in ways}


def spread(values: list[float]) -> Figures:
    """Median and quartiles of CPU seconds."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"cpu_s": _rounded(middle), "quartiles": [_rounded(low), _rounded(high)], "rounds": len(values)}


def ratio(figures: Mapping[str, Figures], of: str, to: str) -> float:
    return round(figures[of]["cpu_s"] / figures[to]["cpu_s"], 3)


def rates(dtype: torch.dtype, repeats: int = 3) -> dict[str, float]:
    """Thousand million floating-point operations a CPU second of single large kernels, each at its best."""
    found: dict[str, float] = {}
    for m, k, n in ((2048, 2048, 2048), (1024, 1280, 5120), (4096, 640, 2560)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        found[f"linear {m}x{k}x{n}"] = _best(lambda a=a, b=b: F.linear(a, b), 2 * m * k * n, repeats)
    for channels, side in ((320, 64), (640, 32)):
        x, w = torch.randn(1, channels, side, side).to(dtype), torch.randn(channels, channels, 3, 3).to(dtype)
        work = 2 * 9 * channels**2 * side**2
        found[f"conv 3x3 {channels}x{side}x{side}"] = _best(lambda x=x, w=w: F.conv2d(x, w, padding=1), work, repeats)
    return found


@torch.no_grad()
def _best(kernel: Callable[[], object], work: float, repeats: int) -> float:
    kernel()
    took: list[float] = []
    for _ in range(repeats):
        began = time.process_time()
        kernel()
        took.append(time.process_time() - began)
    return round(work / min(took) / 1e9, 1)


def memory() -> tuple[int, int]:
    """(now, peak) MiB of this process in RAM; zeros where the system does not tell."""
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.exists() else ""
    now, peak = (re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE) for name in ("VmRSS", "VmHWM"))
    return (int(now[1]) // 1024, int(peak[1]) // 1024) if now and peak else (0, 0)


def forget_peak() -> None:
    """Gives freed memory back to the system; from here on the peak is counted anew. Where the system can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5", encoding="utf-8")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
