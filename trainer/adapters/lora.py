"""LoRA on a denoiser: W x + (alpha / rank) B A x (arXiv 2106.09685), and LoCon's form of it on convolutions."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from trainer.args import AdapterArgs
from trainer.types import BaseModelError, LoraTensors, ModelFamily

NAME = "default"  # of the adapter inside PEFT
ATTENTION = r".*\.attn\d*\.(to_q|to_k|to_v|to_out\.0)"
FEED_FORWARD = r".*\.ff\.net\.(0\.proj|2)"
CONVOLUTION = (
    r".*\.(resnets\.\d+\.(conv1|conv2|conv_shortcut)|downsamplers\.0\.conv|upsamplers\.0\.conv|proj_in|proj_out)"
)
TARGETS = {
    "attention": (ATTENTION,),
    "attention+ff": (ATTENTION, FEED_FORWARD),
    "attention+ff+conv": (ATTENTION, FEED_FORWARD, CONVOLUTION),
}


class LoRA:
    """Low-rank updates of chosen layers, in float32. After `attach` the family computes what it did before (B = 0)."""

    component = "adapter"

    def __init__(self, args: AdapterArgs, seed: int) -> None:
        self.args = args
        self.alpha = float(args.rank if args.alpha is None else args.alpha)
        self._seed = seed
        self._model: LoraModel | None = None
        self._layers: dict[str, Any] = {}  # module path -> PEFT layer

    def attach(self, family: ModelFamily) -> list[tuple[str, nn.Parameter]]:
        """Puts the update into `family.denoiser`; gives its parameters under their module paths.

        Raises:
            BaseModelError: the denoiser has no layer of the kind that `args.targets` names.
        """
        if self._model is not None:
            raise RuntimeError("this LoRA is attached already; detach it first")
        config = LoraConfig(
            r=self.args.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  # PEFT says int and takes any number
            lora_dropout=self.args.dropout,
            target_modules=target_paths(family.denoiser, self.args.targets),
        )
        with torch.random.fork_rng(devices=[]):  # PEFT draws A on the CPU, whatever the base's device
            torch.manual_seed(self._seed)
            self._model = LoraModel(family.denoiser, config, NAME)
        self._layers = {p: m for p, m in family.denoiser.named_modules() if hasattr(m, "lora_A")}
        for layer in self._layers.values():
            layer.lora_A.float()
            layer.lora_B.float()
        return list(self._parameters().items())

    def detach(self) -> None:
        """Puts the base's own layers back."""
        if self._model is not None:
            self._model.unload()
        self._model, self._layers = None, {}

    def state_dict(self) -> dict[str, Tensor]:
        """Every A and B by the name that `attach` gave it (detached, sharing memory)."""
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
        """Inside, the denoiser is the base."""
        were_off = [layer for layer in self._layers.values() if layer.disable_adapters]
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                if not any(layer is other for other in were_off):
                    layer.enable_adapters(True)

    @contextmanager
    def scaled(self, strength: float) -> Generator[None]:
        """Inside, the update counts `strength` times."""
        before = {path: layer.scaling[NAME] for path, layer in self._layers.items()}
        for path, layer in self._layers.items():
            layer.scaling[NAME] = before[path] * strength
        try:
            yield
        finally:
            for path, layer in self._layers.items():
                layer.scaling[NAME] = before[path]

    def penalty(self) -> Tensor | None:
        """LoRA adds nothing to the loss."""
        return None

    def modules(self) -> Mapping[tuple[str, str], LoraTensors]:
        """("denoiser", module path) -> down, up and alpha, for export."""
        return {
            ("denoiser", path): LoraTensors(
                down=layer.lora_A[NAME].weight.detach(), up=layer.lora_B[NAME].weight.detach(), alpha=self.alpha
            )
            for path, layer in self._layers.items()
        }

    def _parameters(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for path, layer in self._layers.items():
            found[f"{path}.lora_A.weight"] = layer.lora_A[NAME].weight
            found[f"{path}.lora_B.weight"] = layer.lora_B[NAME].weight
        return found


def target_paths(denoiser: nn.Module, targets: str) -> list[str]:
    """Full paths of the Linear and Conv2d layers of the named kinds, in the denoiser's order."""
    kinds = [re.compile(pattern) for pattern in TARGETS[targets]]
    layers = [path for path, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for kind, name in zip(kinds, targets.split("+"), strict=True):
        if not any(kind.fullmatch(path) for path in layers):
            raise BaseModelError(f"adapter.targets is {targets}, but this denoiser has no {name} layers")
    return [path for path in layers if any(kind.fullmatch(path) for kind in kinds)]


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
