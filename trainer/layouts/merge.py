"""Updates added to the weights of a family: for good, before a run, or with a strength that changes, to draw with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.layouts.container import LayoutError
from trainer.layouts.read import read
from trainer.types import ModelFamily
from trainer.updates import Difference, Update, difference


def merge(family: ModelFamily, files: Mapping[str, float]) -> None:
    """W + strength (W' - W) for each file (or run directory) and its strength, one after the other, for good.

    Raises:
        LayoutError: a file cannot be read, or does not fit.
    """
    for given, strength in files.items():
        Merged(family, read(given, family)).set(strength)


class Merged:
    """Updates in the weights of a family, which the parameters' own memory holds, so that fingerprints tell."""

    @torch.no_grad()
    def __init__(self, family: ModelFamily, updates: Mapping[tuple[str, str], Update]) -> None:
        """Computes the differences; the weights stay as they are.

        Raises:
            LayoutError: an update does not fit its layer.
        """
        roots: dict[str, nn.Module] = {"denoiser": family.denoiser, **family.text_encoders}
        self._parts: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, as it was, W' - W
        for (component, path), update in updates.items():
            layer = roots[component].get_submodule(path)
            weight = layer.get_parameter("weight")
            try:
                self._add(weight, difference(_on(update, weight.device), weight))
                if isinstance(update, Difference) and update.bias is not None:
                    bias = layer.get_parameter("bias")
                    self._add(bias, difference(Difference(update.bias.to(bias.device)), bias))
            except (ValueError, RuntimeError, AttributeError) as error:
                raise LayoutError(f"the update of {component} {path} does not fit the base: {error}") from error

    @torch.no_grad()
    def set(self, strength: float) -> None:
        """Makes each weight W + strength (W' - W), summed in float32."""
        for parameter, before, change in self._parts:
            parameter.copy_(before.float() + strength * change if strength else before)

    def _add(self, parameter: nn.Parameter, change: Tensor) -> None:
        self._parts.append((parameter, parameter.detach().clone(), change))


def _on(update: Update, device: torch.device) -> Update:
    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(tensor.to(device) for tensor in cast(tuple[Tensor, ...], value))
        return value.to(device) if isinstance(value, Tensor) else value

    return type(update)(**{name: moved(value) for name, value in vars(update).items()})
