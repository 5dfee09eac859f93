"""Norms of the gradients by block, and a warning of parameters that get none."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.args import GradStatsArgs
from trainer.events import Gradients
from trainer.hooks import Context, Hook
from trainer.loop import Run

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"[^.]+(\.\d+)?")  # down_blocks.0, mid_block
NAMED = 5  # parameters that a warning names


class GradStats(Hook):
    """Adds `grad/<component>/<block>`, the l2 norm before clipping, every so many updates, and `grad/dead`.

    A gradient is dead when it is zero in each element, or missing, for `dead_after` updates in a row; of a low-rank
    update the inner half is at the first update alone, as its outer half starts at zero. The log names a dead one once.
    """

    Options = GradStatsArgs

    def __init__(self, context: Context, options: GradStatsArgs) -> None:
        super().__init__(context)
        self.options = options
        self._silent: dict[str, int] = {}  # updates in a row without a gradient

    def on_gradients(self, run: Run, event: Gradients) -> Mapping[str, float]:
        squares: dict[str, list[Tensor]] = {}
        alive: dict[str, Tensor | None] = {}
        for component, named in run.components.items():
            for name, parameter in named:
                if not parameter.requires_grad:
                    continue
                square = None if parameter.grad is None else parameter.grad.detach().float().square().sum()
                alive[f"{component} {name}"] = None if parameter.grad is None else parameter.grad.detach().any()
                if square is not None:
                    squares.setdefault(f"grad/{component}/{block_of(name)}", []).append(square)
        dead = self._count(alive)
        if event.update % self.options.every:
            return {}
        norms = torch.stack([torch.stack(some).sum().sqrt() for some in squares.values()]).tolist() if squares else []
        return {**dict(zip(squares, norms, strict=True)), "grad/dead": float(dead)}

    def _count(self, alive: Mapping[str, Tensor | None]) -> int:
        """How many are dead now; one transfer from the device."""
        there = [flag for flag in alive.values() if flag is not None]
        moved = iter(torch.stack(there).tolist() if there else [])
        fresh: list[str] = []
        for name, flag in alive.items():
            gets_some = flag is not None and next(moved)
            self._silent[name] = 0 if gets_some else self._silent.get(name, 0) + 1
            if self._silent[name] == self.options.dead_after:
                fresh.append(name)
        if fresh:
            more = f" and {len(fresh) - NAMED} more" if len(fresh) > NAMED else ""
            log.warning("no gradient for %d updates: %s%s", self.options.dead_after, ", ".join(fresh[:NAMED]), more)
        return sum(count >= self.options.dead_after for count in self._silent.values())


def block_of(name: str) -> str:
    """`down_blocks.0.attentions.1.to_q.lora_A.weight` -> `down_blocks.0`."""
    found = _BLOCK.match(name)
    return found[0] if found else name
