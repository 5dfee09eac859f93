"""Accelerate, as the loop sees it: device, precision, backward, and the sums over processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, distributed, nn

from trainer.args import RuntimeArgs
from trainer.ranks import Ranks, launched

FP16_LOSS_SCALE = 2.0**16  # that a run begins with, as torch's GradScaler
GROWTH_INTERVAL = 2000  # updates in a row without an overflow after which it is doubled, as there

SMALL = 20_000_000  # weights of a denoiser up to which one thread is the fastest

log = logging.getLogger(__name__)


class EngineError(ValueError):
    """A device or a number of processes that this machine or this door does not have. One sentence."""


class Engine:
    """Where and how the arithmetic of one process runs. Every process of `here` makes one, and the same calls."""

    def __init__(self, runtime: RuntimeArgs, dtype: str, here: Ranks | None = None) -> None:
        self.here = here or Ranks()
        self.rank, self.processes = self.here.rank, self.here.processes
        _check_device(runtime.device, self.processes)
        self._found, self._given = torch.get_num_threads(), runtime.threads
        torch.set_num_threads(self._given or self._found)
        cpu = runtime.device == "cpu" or (self.processes > 1 and not torch.cuda.is_available())
        if self.processes > 1:  # Accelerate takes the group that it finds, and would make one of a store of its own
            group = distributed.PrefixStore("gradients", self.here.store)
            backend = "gloo" if cpu else "nccl"
            distributed.init_process_group(backend, store=group, rank=self.rank, world_size=self.processes)
        self._accelerator = Accelerator(mixed_precision="bf16" if dtype == "bf16" else "no", cpu=cpu)
        self.device: torch.device = self._accelerator.device
        if self._accelerator.num_processes != self.processes:  # each would train a run of its own
            raise EngineError(
                f"Accelerate sees {self._accelerator.num_processes} processes where {self.processes} were started; "
                "start them with torchrun or accelerate launch, and with --runtime.device cpu if no GPU is to be used"
            )
        self.name = "engine"  # in checkpoints
        self._scaled = dtype == "fp16"
        self._scale = FP16_LOSS_SCALE if self._scaled else 1.0
        self._sound = 0  # updates in a row without an overflow

    def autocast(self) -> AbstractContextManager[Any]:
        return self._accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss * self._scale)

    def suit(self, denoiser: nn.Module) -> None:
        """Gives a small denoiser one thread on a CPU, unless a number was given: several wait more than they help."""
        weights = sum(parameter.numel() for parameter in denoiser.parameters())
        if self._given is None and self.device.type == "cpu" and weights < SMALL:
            torch.set_num_threads(1)

    def release(self) -> None:
        """Leaves the process as it was: Accelerate keeps its choice of device and precision, torch its threads."""
        torch.set_num_threads(self._found)
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def watch(self, parameter: nn.Parameter) -> None:
        """With fp16 weights small gradients would vanish on their way: they travel scaled and arrive unscaled."""
        if self._scaled:
            parameter.register_hook(self._unscaled)

    def settled(self, finite: bool) -> bool:
        """Told once an update whether all gradients are finite; whether the run can go on.

        With fp16 weights the loss scale adapts (arXiv 1710.03740): after an overflow it is halved and the update left
        out, after GROWTH_INTERVAL sound updates it is doubled.
        """
        if finite:
            self._sound += 1
            if self._scaled and self._sound % GROWTH_INTERVAL == 0:
                self._scale *= 2.0
            return True
        self._sound = 0
        if self._scale <= 1.0:
            return False
        self._scale /= 2.0
        log.info(
            "gradients overflowed in fp16: the update is left out, and the loss scale is %g from now on", self._scale
        )
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to scale alike."""
        return {"scale": torch.tensor([self._scale, self._sound], dtype=torch.float64)} if self._scaled else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What state_dict gave."""
        self._scale, self._sound = float(state["scale"][0]), int(state["scale"][1])

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient / self._scale

    def gathered(self, rows: Sequence[Any]) -> list[Any]:
        """`Ranks.gathered`: small things, as JSON."""
        return self.here.gathered(rows)

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives every process the mean of all processes' gradients, summed in float32 in one message.

        A parameter that has no gradient on any process keeps none, as in one process.
        """
        if self.processes == 1:
            return
        parts = [torch.zeros(p.numel(), device=self.device) if p.grad is None else p.grad for p in parameters]
        given = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        flat = torch.cat([*(part.detach().flatten().float() for part in parts), given])
        with self.here.heard():
            distributed.all_reduce(flat)
        *means, counts = (flat / self.processes).split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, mean, count in zip(parameters, means, counts.tolist(), strict=True):
            if count > 0:
                parameter.grad = mean.view_as(parameter).to(parameter.dtype)

    @torch.no_grad()
    def equalise(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives every process the first one's parameters."""
        if self.processes > 1:
            for parameter in parameters:
                with self.here.heard():
                    distributed.broadcast(parameter.data, src=0)


def _check_device(device: str, processes: int) -> None:
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not have.get(device, True):
        raise EngineError(f"runtime.device is {device}, which this machine does not have; use auto or cpu")
    started = launched()[1]
    if started != processes:
        raise EngineError(f"this was started as {started} processes, but needs one: start it without the launcher")
    if processes == 1:
        return
    if device == "mps":
        raise EngineError(f"this was started as {processes} processes, and an mps device can serve one: start one")
    place, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device != "cpu" and 0 < devices <= place:
        raise EngineError(
            f"more processes were started on this machine than its {devices} GPUs: start {devices} on each machine "
            f"(torchrun --nproc_per_node {devices}), or train with --runtime.device cpu"
        )
