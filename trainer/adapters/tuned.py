"""The adapters whose layers are PEFT's."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from trainer.adapters.layered import NAME, Layers
from trainer.adapters.targets import Target


class Tuned(Layers):
    """Lets PEFT put its layers in, and take them out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._models: list[Any] = []

    @abstractmethod
    def _model(self, root: nn.Module, targets: Sequence[Target]) -> Any:
        """PEFT's model around `root`, with its layers in."""

    def _put(self, root: nn.Module, targets: Sequence[Target]) -> Mapping[str, Any]:
        self._models.append(self._model(root, targets))
        layers: dict[str, Any] = {path: m for path, m in root.named_modules() if hasattr(m, "base_layer")}
        for layer in layers.values():
            for parameter in self._tensors(layer).values():
                parameter.data = parameter.data.float()
        return layers

    def _take_out(self) -> None:
        for model in self._models:
            model.unload()
        self._models = []

    def _ranks(self, targets: Sequence[Target]) -> dict[str, int]:
        """For PEFT's rank_pattern: those that differ from args.rank."""
        return {exactly(target.path): target.rank for target in targets if target.rank != self.args.rank}

    def _alphas(self, targets: Sequence[Target]) -> dict[str, float]:
        return {exactly(target.path): target.alpha for target in targets if target.alpha != self.alpha}


def exactly(path: str) -> str:
    """A pattern for PEFT that no other path ends with."""
    return f"^{re.escape(path)}"


def at(parameters: Any) -> nn.Parameter:
    """The adapter's own of what a PEFT layer keeps for each."""
    return parameters[NAME]
