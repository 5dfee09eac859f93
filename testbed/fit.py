"""One small training loop for every network of the testbed: two processes, resumable, seeded.

Two single-thread processes that average their gradients use two cores better than one process
with two threads. Every step's randomness is a function of (seed, step, rank), so a resumed fit
goes on exactly where it stopped.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger("testbed")

SAVE_EVERY_S = 60
LOG_EVERY_S = 20


class Task(ABC):
    """What is fitted: a model, a loss for a step, and how long. Subclasses are picklable."""

    name: str = ""
    steps: int = 0
    lr: float = 1e-3
    warmup: int = 50
    decay_steps: int = 0  # the last steps, over which the rate falls linearly to 2 %
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    ema: float = 0.0
    seed: int = 0

    @abstractmethod
    def model(self) -> nn.Module:
        """What is fitted, as it begins."""

    def prepare(self, rank: int) -> None:  # noqa: B027  most need nothing
        """Loads what `loss` needs, once in each process."""

    @abstractmethod
    def loss(self, model: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Of one batch, and what is shown of it."""

    def lr_at(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        left = (self.steps - step) / self.decay_steps if self.decay_steps else 1.0
        return self.lr * rise * max(0.02, min(1.0, left))


def fit(task: Task, folder: Path, processes: int = 2) -> Path:
    """Fits the task and returns its weights file; what was done before is not done again."""
    done = folder / f"{task.name}.safetensors"
    if done.exists():
        log.info("%s: already fitted", task.name)
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(_worker, (processes, f"file://{meeting}/rendezvous", task, str(folder)), nprocs=processes)
    return done


def _worker(rank: int, processes: int, meeting: str, task: Task, folder: str) -> None:
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes, timeout=timedelta(minutes=30))
    try:
        _fit(task, Path(folder), rank, processes)
    finally:
        dist.destroy_process_group()


def _fit(task: Task, folder: Path, rank: int, processes: int) -> None:
    torch.manual_seed(task.seed)
    model = task.model()
    task.prepare(rank)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.lr, betas=task.betas, weight_decay=task.weight_decay, fused=True)
    average = {k: v.clone() for k, v in model.state_dict().items()} if task.ema else None
    resume = folder / f"{task.name}.resume.safetensors"
    start, spent = _load(resume, model, optimizer, average) if resume.exists() else (0, 0.0)
    began = saved = told = time.monotonic()
    sums: dict[str, float] = {}
    count = 0
    for step in range(start, task.steps):
        torch.manual_seed(hash((task.seed, step, rank)) % 2**31)
        loss, terms = task.loss(model, step, np.random.default_rng((task.seed, step, rank)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients(parameters, processes)
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = task.lr_at(step)
        optimizer.step()
        if average is not None:
            _follow(average, model, min(task.ema, (step + 1) / (step + 10)))
        count += 1
        for key, value in {"loss": float(loss.detach()), **terms}.items():
            sums[key] = sums.get(key, 0.0) + value
        now = time.monotonic()
        if rank == 0 and (now - told > LOG_EVERY_S or step + 1 == task.steps):
            eta = (now - began) / (step + 1 - start) * (task.steps - step - 1)
            shown = " ".join(f"{k} {v / count:.4f}" for k, v in sums.items())
            log.info("%s %d/%d %s, %d min left", task.name, step + 1, task.steps, shown, round(eta / 60))
            told, sums, count = now, {}, 0
        if rank == 0 and now - saved > SAVE_EVERY_S:
            _save(resume, model, optimizer, average, step + 1, spent + now - began)
            saved = now
    if rank == 0:
        weights = average if average is not None else model.state_dict()
        seconds = spent + time.monotonic() - began
        _write(
            folder / f"{task.name}.safetensors", dict(weights), {"seconds": f"{seconds:.0f}", "steps": str(task.steps)}
        )
        resume.unlink(missing_ok=True)


def _average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= processes
    for p, piece in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        p.grad = piece.view_as(p)


@torch.no_grad()
def _follow(average: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    state = model.state_dict()
    floats = [k for k, v in average.items() if v.is_floating_point()]
    torch._foreach_lerp_([average[k] for k in floats], [state[k] for k in floats], 1 - decay)


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor] | None,
    step: int,
    spent: float,
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in (average or {}).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    _write(path, tensors, {"step": str(step), "seconds": repr(spent)})


def _load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None
) -> tuple[int, float]:
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    if average is not None:
        average.update({k[8:]: v for k, v in tensors.items() if k.startswith("average.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(meta["step"]), float(meta["seconds"])


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    beside = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, beside, metadata)
    os.chmod(beside, 0o644)
    os.replace(beside, path)
