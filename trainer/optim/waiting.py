"""What an optimizer remembers of some tensors, kept in other memory between updates: rules with a device.

Weights, gradients and arithmetic stay where they are. Before a step the memory comes back as it was, so a run with
such a rule is to the bit the run without it, with room for its activations while they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.args import RuleArgs
from trainer.optim.rules import Components
from trainer.optim.updates import HasAverages


class Waiting:
    """Moves the states of `parameters` away after each step of their optimizer, and back before the next.

    Args:
        away: a state's tensor -> the same in other memory.
        back: that, and the device of its parameter -> the tensor as it was.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        away: Callable[[Tensor], Tensor],
        back: Callable[[Tensor, torch.device], Tensor],
    ) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._to_there, self._to_here = away, back
        self._there: list[tuple[nn.Parameter, str]] = []
        optimizer.register_step_pre_hook(self._fetched)
        optimizer.register_step_post_hook(self._sent)
        optimizer.register_load_state_dict_post_hook(lambda _: self._loaded())

    def _fetched(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._fetch()

    def _sent(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._send()

    @property
    def names(self) -> list[str]:
        """Of the states that are away, one for each tensor of a parameter."""
        return [name for _, name in self._there]

    def _send(self) -> None:
        for parameter in self._parameters:
            state = self._optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.device == parameter.device:  # counters are kept on the CPU
                    state[name] = self._to_there(value)
                    self._there.append((parameter, name))

    def _fetch(self) -> None:
        for parameter, name in self._there:
            state = self._optimizer.state[parameter]
            state[name] = self._to_here(state[name], parameter.device)
        self._there = []

    def _loaded(self) -> None:
        """What was loaded is where the parameters are."""
        self._there = []
        self._send()


def wait(
    found: Mapping[str, Mapping[str, RuleArgs]], components: Components, optimizers: Mapping[str, Optimizer]
) -> list[Waiting]:
    """Has the states of tensors whose rule says device cpu wait there, where they are not there anyhow.

    Raises:
        ValueError: the optimizer looks at what it remembers between updates, too.
    """
    made: list[Waiting] = []
    for component, named in components.items():
        rules = {name: rule for name, rule in found[component].items() if rule.device == "cpu"}
        if rules and isinstance(optimizers[component], HasAverages):
            raise ValueError(
                f"optim.rules: {next(iter(rules.values())).match!r} has device cpu, but the optimizer of {component} "
                "averages, and needs what it remembers between updates; leave device out, or take another optimizer"
            )
        parameters = [parameter for name, parameter in named if name in rules and elsewhere(parameter)]
        if parameters:
            made.append(Waiting(optimizers[component], parameters, _to_cpu, _to_device))
    return made


def elsewhere(parameter: nn.Parameter) -> bool:
    """Whether it is on a device with memory of its own."""
    return parameter.device.type != "cpu"


def _to_cpu(value: Tensor) -> Tensor:
    return value.to("cpu")


def _to_device(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device)
