"""Rank and module dropout: what a layer's update leaves out of one micro (sd-scripts, LyCORIS).

Everything is drawn from the micro's seed and the layer's name alone. So a forward that is computed again for the
backward pass, a second prediction of the same micro and a resumed run leave out the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.seed import derive


class Drops:
    """What one layer leaves out; nothing before the first `redraw`."""

    def __init__(self, rank: float, module: float, name: str) -> None:
        """Args: rank, module: probabilities, in 0..1 without 1; name: of the layer, unique in a run."""
        self._rank, self._module, self._name = rank, module, name
        self._seed: int | None = None

    def redraw(self, seed: int) -> None:
        """Draws anew: `seed` is the micro's."""
        self._seed = derive(seed, "drops", self._name)

    def everything(self) -> bool:
        """Whether the update as a whole is left out."""
        return self._seed is not None and bool(self._uniform("module", [1]) < self._module)

    def kept(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """0 for what is left out and 1 / (1 - rank) for the rest, so that the mean stays; on the device of `like`."""
        if self._seed is None:
            return torch.ones(*shape, dtype=like.dtype, device=like.device)
        return ((self._uniform("rank", shape) >= self._rank) / (1 - self._rank)).to(like)

    def _uniform(self, what: str, shape: Sequence[int]) -> Tensor:
        assert self._seed is not None
        return torch.rand(*shape, generator=torch.Generator().manual_seed(derive(self._seed, what)))


def leave_out_all(drops: Drops, layer: nn.Module) -> None:
    """Has a layer with an update compute what its base computes, where everything is left out."""

    def base(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return layer.get_submodule("base_layer")(*given) if layer.training and drops.everything() else output

    layer.register_forward_hook(base)
