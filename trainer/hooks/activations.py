"""Mean, spread and largest value of what chosen layers put out while they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.args import ActivationsArgs
from trainer.events import Gradients
from trainer.hooks import Context
from trainer.hooks.layer import LayerHook
from trainer.loop import Run


class Activations(LayerHook):
    """Adds `activation_mean/<layer>`, `activation_std/<layer>` and `activation_max/<layer>` (of the absolute value).

    Each is over all passes with gradients since the last time: the mean and the largest of the passes' own. Of an
    output that is several tensors the first counts.
    """

    Options = ActivationsArgs

    def __init__(self, context: Context, options: ActivationsArgs) -> None:
        super().__init__(context, *options.layers)
        self.options = options
        self._passes: dict[str, list[Tensor]] = {}  # layer -> [3] of each pass

    def on_forward(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output)
        if torch.is_grad_enabled() and tensor is not None:
            values = tensor.detach().float()
            row = torch.stack([values.mean(), values.std(correction=0), values.abs().amax()])
            self._passes.setdefault(name, []).append(row)

    def on_gradients(self, run: Run, event: Gradients) -> Mapping[str, float]:
        if (event.update + 1) % self.options.every or not self._passes:
            return {}
        rows = {name: torch.stack(passes) for name, passes in self._passes.items()}
        figures = torch.stack([torch.cat([row[:, :2].mean(0), row[:, 2:].amax(0)]) for row in rows.values()])
        self._passes = {}
        return {
            f"activation_{kind}/{name}": value
            for name, values in zip(rows, figures.tolist(), strict=True)
            for kind, value in zip(("mean", "std", "max"), values, strict=True)
        }


def first_tensor(output: Any) -> Tensor | None:
    """Of a layer's output: itself, or the first of a tuple or of a named output."""
    if isinstance(output, Tensor):
        return output
    inside = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((item for item in inside if isinstance(item, Tensor)), None)
