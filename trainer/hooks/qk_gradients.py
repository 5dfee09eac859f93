"""Mean |gradient| of the attention's query and key projections: where attention starts to move, or to explode."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.events import Gradients
from trainer.hooks import Hook
from trainer.loop import Run

_PROJECTION = {"q": re.compile(r"(^|[._])(to_q|q_proj)([._]|$)"), "k": re.compile(r"(^|[._])(to_k|k_proj)([._]|$)")}


class QKGradients(Hook):
    """Adds `grad_q` and `grad_k` to Step.extra when the trained parameters have such layers."""

    def on_gradients(self, run: Run, event: Gradients) -> Mapping[str, float]:
        extra: dict[str, float] = {}
        for letter, pattern in _PROJECTION.items():
            gradients = [
                parameter.grad
                for named in run.components.values()
                for name, parameter in named
                if parameter.grad is not None and pattern.search(name)
            ]
            if gradients:
                extra[f"grad_{letter}"] = _mean_abs(gradients)
        return extra


def _mean_abs(tensors: list[Tensor]) -> float:
    """Over all elements of all tensors; one transfer from the device."""
    total = torch.stack([tensor.detach().abs().sum(dtype=torch.float32) for tensor in tensors]).sum()
    return total.item() / sum(tensor.numel() for tensor in tensors)
