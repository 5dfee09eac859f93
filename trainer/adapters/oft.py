"""OFT: the inputs of a layer are rotated, block by block: angles between its neurons stay (arXiv 2306.07280)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import OFTConfig
from peft.tuners.oft import OFTModel
from torch import Tensor, nn

from trainer.adapters.layered import NAME
from trainer.adapters.targets import Target
from trainer.adapters.tuned import Tuned
from trainer.types import BaseModelError
from trainer.updates import Difference, Update


class OFT(Tuned):
    """W' = W R^T with R block-diagonal and orthogonal (Cayley's form, exact). Linear layers only."""

    takes = (nn.Linear,)  # PEFT's rotation of a convolution's inputs is not the base at first, nor what it merges to
    ranked = False

    def _model(self, root: nn.Module, targets: Sequence[Target]) -> Any:
        block = self.args.block
        widths = {target.path: _width(root, target.path) for target in targets}
        uneven = [path for path, width in widths.items() if width % block]
        if uneven:
            raise BaseModelError(
                f"adapter.block is {block}, which does not divide the input width of {len(uneven)} layers "
                f"({uneven[0]}: {widths[uneven[0]]}); take a divisor of it"
            )
        config = OFTConfig(
            r=0, oft_block_size=block, use_cayley_neumann=False, target_modules=[target.path for target in targets]
        )
        return OFTModel(root, config, NAME)

    def _tensors(self, layer: Any) -> dict[str, nn.Parameter]:
        return {"oft_R.weight": layer.oft_R[NAME].weight}

    def _update(self, layer: Any) -> Update:
        """As a difference: no client reads rotations of inputs."""
        weight = layer.get_base_layer().weight.float()
        return Difference(weight @ layer.get_delta_weight(NAME).T - weight)

    @contextmanager
    def scaled(self, strength: float) -> Generator[None]:
        """Inside, each layer's weight is W + strength (W' - W), which is not orthogonal to W in between."""

        def between(layer: Any, given: tuple[Any, ...], output: Tensor) -> Tensor:
            base: Tensor = layer.get_base_layer()(*given)
            return base + strength * (output - base)

        with ExitStack() as hooks:
            for layer in self._layers.values():
                hooks.enter_context(layer.register_forward_hook(between))
            yield


def _width(root: nn.Module, path: str) -> int:
    layer = root.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer.in_features
