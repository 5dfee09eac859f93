"""Updates added to the weights of a family: for good, before a run, or with strengths that change, to draw with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.layouts.container import LayoutError
from trainer.layouts.read import read
from trainer.types import ModelFamily
from trainer.updates import Difference, Update, difference

Updates = Mapping[tuple[str, str], Update]  # (component, module path) -> what changed
StrengthOf = Callable[[str, str], float]  # (component, module path) -> strength


def merge(family: ModelFamily, files: Mapping[str, float]) -> None:
    """W + strength (W' - W) for each file (or run directory) and its strength, one after the other, for good.

    Raises:
        LayoutError: a file cannot be read, or does not fit.
    """
    for given, strength in files.items():
        updates = read(given, family)
        check(family, updates)
        Blend(family).set([(updates, _everywhere(strength))])


def check(family: ModelFamily, updates: Updates) -> None:
    """Compares shapes, and computes nothing.

    Raises:
        LayoutError: an update does not fit its layer.
    """
    meta = torch.device("meta")
    for (component, path), update in updates.items():
        layer = _layer(family, component, path)
        try:
            for name, part in _parts(update).items():
                difference(_on(part, meta), layer.get_parameter(name).to(meta))
        except (ValueError, RuntimeError, AttributeError) as error:
            raise LayoutError(f"the update of {component} {path} does not fit the base: {error}") from error


class Blend:
    """Any number of updates in the weights of a family, which the parameters' own memory holds.

    Weights as they were before are kept on the CPU while a layer is changed, so nothing of one choice is left in the
    next.
    """

    def __init__(self, family: ModelFamily) -> None:
        self._family = family
        self._before: dict[tuple[str, str, str], Tensor] = {}  # component, path, name of the parameter

    @torch.no_grad()
    def set(self, chosen: Sequence[tuple[Updates, StrengthOf]]) -> None:
        """Makes each weight W + sum of strength (W' - W), every W' of W alone, summed in float32 and rounded once.

        Updates that `check` has passed; the order changes nothing but the rounding.
        """
        wanted: dict[tuple[str, str, str], list[tuple[Update, float]]] = {}
        for updates, strength_of in chosen:
            for (component, path), update in updates.items():
                strength = strength_of(component, path)
                if strength:
                    for name, part in _parts(update).items():
                        wanted.setdefault((component, path, name), []).append((part, strength))
        for key in [*self._before]:
            if key not in wanted:
                self._parameter(key).copy_(self._before.pop(key))
        for key, parts in wanted.items():
            parameter = self._parameter(key)
            if key not in self._before:
                self._before[key] = parameter.detach().to("cpu", copy=True)
            before = self._before[key].to(parameter.device)
            total = before.float().clone()
            for update, strength in parts:
                total += strength * difference(_on(update, parameter.device), before)
            parameter.copy_(total)

    def _parameter(self, key: tuple[str, str, str]) -> nn.Parameter:
        component, path, name = key
        return _layer(self._family, component, path).get_parameter(name)


def _layer(family: ModelFamily, component: str, path: str) -> nn.Module:
    root = family.denoiser if component == "denoiser" else family.text_encoders[component]
    return root.get_submodule(path)


def _parts(update: Update) -> dict[str, Update]:
    """The update by the parameter of the layer that it changes."""
    if isinstance(update, Difference) and update.bias is not None:
        return {"weight": Difference(update.weight), "bias": Difference(update.bias)}
    return {"weight": update}


def _everywhere(strength: float) -> StrengthOf:
    return lambda component, path: strength


def _on(update: Update, device: torch.device) -> Update:
    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(tensor.to(device) for tensor in cast(tuple[Tensor, ...], value))
        return value.to(device) if isinstance(value, Tensor) else value

    return type(update)(**{name: moved(value) for name, value in vars(update).items()})
