"""The layers of this room's own: modules that stand in the place of a base's, and those adapters that use them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trainer.adapters.layered import NAME, Layers
from trainer.adapters.targets import Target


class StandIn(nn.Module):
    """Holds the base's layer and an update of it; everything else about it is the base's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base  # first: a model takes its first parameter's dtype for its own
        self.own = nn.ParameterDict()
        self.scaling = {NAME: 1.0}
        self.disable_adapters = False

    @abstractmethod
    def changed(self, x: Tensor, strength: float) -> Tensor:
        """The layer's output with W + strength (W' - W)."""

    def forward(self, x: Tensor) -> Tensor:
        strength = 0.0 if self.disable_adapters else self.scaling[NAME]
        return self.base_layer(x) if strength == 0.0 else self.changed(x, strength)

    def enable_adapters(self, enabled: bool) -> None:
        self.disable_adapters = not enabled

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)  # what a model asks of a layer: weight, eps, ...


class InPlace(Layers):
    """Replaces layers by stand-ins, and puts them back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._back: list[Callable[[], None]] = []

    @abstractmethod
    def _made(self, base: nn.Module, target: Target) -> StandIn: ...

    def _put(self, root: nn.Module, targets: Sequence[Target]) -> Mapping[str, Any]:
        layers: dict[str, StandIn] = {}
        for target in targets:
            parent_path, _, name = target.path.rpartition(".")
            parent, base = root.get_submodule(parent_path), root.get_submodule(target.path)
            layers[target.path] = self._made(base, target).to(next(base.parameters()).device)
            setattr(parent, name, layers[target.path])
            self._back.append(_putting(parent, name, base))
        return layers

    def _take_out(self) -> None:
        for put_back in self._back:
            put_back()
        self._back = []


def _putting(parent: nn.Module, name: str, base: nn.Module) -> Callable[[], None]:
    return lambda: setattr(parent, name, base)
