"""What all adapters that change layers share: choosing, attaching, switching off, strength, state, limits.

The layers that PEFT or this room puts in the place of a base's offer the same few things, see `Layer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from trainer.adapters.drops import Drops, leave_out_all
from trainer.adapters.targets import MATRICES, Target, choose
from trainer.args import AdapterArgs
from trainer.types import BaseModelError, ModelFamily
from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, Update, difference

NAME = "default"  # of the adapter inside PEFT


class Layer(Protocol):
    """A layer that stands in the place of a base's own, with an update."""

    scaling: dict[str, float]  # of the update, under NAME

    @property
    def disable_adapters(self) -> bool: ...
    def enable_adapters(self, enabled: bool) -> None: ...
    def get_base_layer(self) -> nn.Module: ...


class Layers(ABC):
    """Trains updates of chosen layers of the denoiser, or of the text encoders, in float32.

    After `attach` the family computes what it did before.
    """

    takes: tuple[type[nn.Module], ...] = MATRICES
    ranked = True  # whether the rank must fit the layers' widths
    pace = 1.0  # how many times the usual rate of a LoRA it takes, where none is given

    def __init__(self, args: AdapterArgs, seed: int, part: str = "denoiser") -> None:
        """Args: part: "denoiser" or "text"."""
        self.args = args
        self.alpha = float(args.rank if args.alpha is None else args.alpha)
        self.component = "adapter" if part == "denoiser" else "text"
        self._part = part
        self._seed = seed
        self._layers: dict[tuple[str, str], Any] = {}  # (component, module path) -> Layer
        self._drops: list[Drops] = []  # of the layers, where something is left out

    # --- what a kind says

    @abstractmethod
    def _put(self, root: nn.Module, targets: Sequence[Target]) -> Mapping[str, Any]:
        """Puts layers with an update, which does nothing yet, into `root`; by path."""

    @abstractmethod
    def _take_out(self) -> None:
        """Puts the base's own layers back."""

    @abstractmethod
    def _tensors(self, layer: Any) -> dict[str, nn.Parameter]:
        """The layer's parameters, by the end of their names."""

    @abstractmethod
    def _update(self, layer: Any) -> Update:
        """What the layer's parameters say, with gradients, at full strength."""

    def _drop_ranks(self, layer: Any, drops: Drops) -> None:
        """Has the layer leave out what `drops.kept` says, in training. ValueError: this kind cannot."""
        raise ValueError(f"adapter.rank_dropout is not for kind {self.args.kind}")

    # --- what all kinds do

    def attach(self, family: ModelFamily) -> list[tuple[str, nn.Parameter]]:
        """Puts updates into the family; gives their parameters under their module paths.

        Raises:
            BaseModelError: a layer that `args` names is not there, or cannot be changed so.
        """
        if self._layers:
            raise RuntimeError("this adapter is attached already; detach it first")
        roots = {"denoiser": family.denoiser} if self._part == "denoiser" else family.text_encoders
        chosen = {
            name: choose(root, self.args, self._part, takes=self.takes, ranked=self.ranked)
            for name, root in roots.items()
        }
        others = [p for root in roots.values() for p in root.parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=[]):  # start values are drawn on the CPU, whatever the base's device
            torch.manual_seed(self._seed)
            for name, root in roots.items():
                for path, layer in self._put(root, chosen[name]).items():
                    self._layers[name, path] = layer
        self._drop()
        for parameter in others:  # PEFT freezes all but its own
            parameter.requires_grad_(True)
        found = {(name, target.path) for name, targets in chosen.items() for target in targets}
        if found != self._layers.keys():
            raise RuntimeError(f"other layers than the chosen ones were changed: {sorted(found ^ self._layers.keys())}")
        return list(self._parameters().items())

    def detach(self) -> None:
        """Puts the base's own layers back."""
        self._take_out()
        self._layers, self._drops = {}, []

    def redraw(self, seed: int) -> None:
        """Draws anew which ranks and updates are left out until the next call; sampling leaves out none."""
        for drops in self._drops:
            drops.redraw(seed)

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter by the name that `attach` gave it (detached, sharing memory)."""
        return {name: parameter.detach() for name, parameter in self._parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies `state` into the parameters.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape.
        """
        parameters = self._parameters()
        check_names(state, parameters)
        for name, parameter in parameters.items():
            parameter.copy_(state[name])

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Inside, the family is the base."""
        were_on = [layer for layer in self._layers.values() if not layer.disable_adapters]
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in were_on:
                layer.enable_adapters(True)

    @contextmanager
    def scaled(self, strength: float) -> Generator[None]:
        """Inside, each layer's weight is W + strength (W' - W)."""
        before = {key: layer.scaling[NAME] for key, layer in self._layers.items()}
        for key, layer in self._layers.items():
            layer.scaling[NAME] = before[key] * strength
        try:
            yield
        finally:
            for key, layer in self._layers.items():
                layer.scaling[NAME] = before[key]

    def penalty(self) -> Tensor | None:
        """adapter.l1 times the mean |W' - W| over all weights that have an update."""
        if not self.args.l1:
            return None
        changes = [difference(self._update(layer), _weight(layer)) for layer in self._layers.values()]
        total = torch.stack([change.abs().sum() for change in changes]).sum()
        return self.args.l1 * total / sum(change.numel() for change in changes)

    @torch.no_grad()
    def constrain(self) -> None:
        """After an update: no layer's |W' - W| may be above adapter.max_norm, as in sd-scripts' scale_weight_norms."""
        if self.args.max_norm is None:
            return
        for layer in self._layers.values():
            norm = difference(self._update(layer), _weight(layer)).norm()
            if norm > self.args.max_norm:
                factors = self._factors(layer)
                for factor in factors:
                    factor.mul_((self.args.max_norm / norm) ** (1 / len(factors)))

    def lr_scale(self, name: str) -> float:
        """How many times faster than the others the parameter of that name learns."""
        return 1.0

    def modules(self) -> Mapping[tuple[str, str], Update]:
        """(component, module path) -> the update, detached; component is "denoiser" or a text encoder's name."""
        with torch.no_grad():
            return {key: _detached(self._update(layer)) for key, layer in self._layers.items()}

    @torch.no_grad()
    def differences(self) -> Mapping[tuple[str, str], Difference]:
        """The same as W' - W in float32."""
        return {
            key: update
            if isinstance(update, Difference)
            else Difference(difference(update, _weight(self._layers[key])))
            for key, update in self.modules().items()
        }

    @torch.no_grad()
    def begin(self, updates: Mapping[tuple[str, str], Update]) -> None:
        """Starts from the updates of another run. Layers that they lack start as they would without.

        Raises:
            BaseModelError: an update is of another kind or shape than this adapter's, or of a layer it has not.
        """
        own = {key: update for key, update in updates.items() if (key[0] == "denoiser") == (self._part == "denoiser")}
        for (component, path), update in own.items():
            layer = self._layers.get((component, path))
            if layer is None:
                raise BaseModelError(
                    f"adapter.start has an update of {component} {path}, which this adapter does not train; choose the "
                    "layers that it was trained on"
                )
            try:
                self._copy(layer, update)
            except ValueError as error:
                raise BaseModelError(f"adapter.start does not fit at {component} {path}: {error}") from error

    def _copy(self, layer: Any, update: Update) -> None:
        raise ValueError(f"an adapter of kind {self.args.kind} cannot start from a file")

    def _factors(self, layer: Any) -> list[nn.Parameter]:
        """Parameters whose product the update is."""
        raise ValueError(f"adapter.max_norm is not for kind {self.args.kind}")

    def _drop(self) -> None:
        args = self.args
        for key, layer in self._layers.items() if args.rank_dropout or args.module_dropout else ():
            drops = Drops(args.rank_dropout, args.module_dropout, ".".join(key))
            if args.rank_dropout:
                self._drop_ranks(layer, drops)
            if args.module_dropout:
                leave_out_all(drops, layer)
            self._drops.append(drops)

    def _parameters(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for (component, path), layer in self._layers.items():
            prefix = "" if component == "denoiser" else f"{component}."
            for end, parameter in self._tensors(layer).items():
                found[f"{prefix}{path}.{end}"] = parameter
        return found


def put(target: nn.Parameter, given: Tensor, factor: float = 1.0) -> None:
    """Copies a tensor of the same shape, `factor` times.

    Raises:
        ValueError: the shapes differ.
    """
    if target.shape != given.shape:
        raise ValueError(f"it has {list(given.shape)} where this run has {list(target.shape)}; are the ranks equal?")
    target.copy_(given if factor == 1.0 else given.float() * factor)


def expect(update: Update, kind: type[Any], name: str) -> Any:
    """`update`, which must be of the class `kind`."""
    if not isinstance(update, kind):
        raise ValueError(f"it holds {KINDS[type(update)]}, and adapter.kind is {name}")
    return update


KINDS: dict[type[Update], str] = {
    LoraTensors: "a LoRA",
    LohaTensors: "a LoHa",
    LokrTensors: "a LoKr",
    Difference: "full differences",
}


def _weight(layer: Any) -> Tensor:
    return layer.get_base_layer().weight


def _detached(update: Update) -> Update:
    values = {name: _plain(value) for name, value in vars(update).items()}
    return type(update)(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(tensor.detach() for tensor in cast(tuple[Tensor, ...], value))
    return value.detach() if isinstance(value, Tensor) else value


def check_names(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuses a state that is not exactly the parameters' names and shapes."""
    missing, unknown = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or unknown:
        raise ValueError(
            f"the adapter's tensors do not fit: {len(missing)} missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}"
        )
    for name, parameter in parameters.items():
        if state[name].shape != parameter.shape:
            raise ValueError(f"{name} has shape {list(state[name].shape)}; the adapter's is {list(parameter.shape)}")
