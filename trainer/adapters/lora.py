"""LoRA: W x + (alpha / rank) B A x (arXiv 2106.09685), LoCon's form of it on convolutions, rsLoRA, LoRA+."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from trainer.adapters.drops import Drops
from trainer.adapters.fused import fuse
from trainer.adapters.layered import NAME, expect, put
from trainer.adapters.targets import Target
from trainer.adapters.tuned import Tuned
from trainer.updates import LoraTensors, Update


class LoRA(Tuned):
    """Low-rank updates of chosen layers. After `attach` the family computes what it did before (B = 0)."""

    def _model(self, root: nn.Module, targets: Sequence[Target]) -> Any:
        config = LoraConfig(
            r=self.args.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  # PEFT says int and takes any number
            lora_dropout=self.args.dropout,
            use_rslora=self.args.rank_stabilised,
            target_modules=[target.path for target in targets],
            rank_pattern=self._ranks(targets),
            alpha_pattern=self._alphas(targets),
        )
        return LoraModel(root, config, NAME)

    def _put(self, root: nn.Module, targets: Sequence[Target]) -> Mapping[str, Any]:
        layers = super()._put(root, targets)
        if not self.args.dropout:
            for layer in layers.values():
                fuse(layer)
        return layers

    def _tensors(self, layer: Any) -> dict[str, nn.Parameter]:
        return {"lora_A.weight": layer.lora_A[NAME].weight, "lora_B.weight": layer.lora_B[NAME].weight}

    def _drop_ranks(self, layer: Any, drops: Drops) -> None:
        """Of each picture its own, as sd-scripts has it."""

        def some(down: nn.Module, given: tuple[Tensor, ...], ranks: Tensor) -> Tensor:
            if not layer.training:
                return ranks
            axis = 1 if isinstance(down, nn.Conv2d) else ranks.ndim - 1
            shape = [size if i in (0, axis) else 1 for i, size in enumerate(ranks.shape)]
            return ranks * drops.kept(ranks, shape)

        layer.lora_A[NAME].register_forward_hook(some)

    def _update(self, layer: Any) -> Update:
        return LoraTensors(
            down=layer.lora_A[NAME].weight,
            up=layer.lora_B[NAME].weight,
            alpha=effective_alpha(float(layer.lora_alpha[NAME]), layer.r[NAME], self.args.rank_stabilised),
        )

    def lr_scale(self, name: str) -> float:
        """LoRA+ (arXiv 2402.12354): B learns faster than A."""
        return self.args.lora_plus if name.endswith("lora_B.weight") else 1.0

    def _copy(self, layer: Any, update: Update) -> None:
        given: LoraTensors = expect(update, LoraTensors, "lora")
        if given.magnitude is not None:
            raise ValueError("it holds a DoRA, and adapter.kind is lora")
        put(layer.lora_A[NAME].weight, given.down)
        put(layer.lora_B[NAME].weight, given.up, rescaled(given, layer.scaling[NAME]))

    def _factors(self, layer: Any) -> list[nn.Parameter]:
        return list(self._tensors(layer).values())


def effective_alpha(alpha: float, rank: int, stabilised: bool) -> float:
    """The alpha that with the usual alpha / rank gives the scale in force; rsLoRA's is alpha / sqrt(rank)."""
    return alpha * math.sqrt(rank) if stabilised else alpha


def rescaled(given: LoraTensors, scale: float) -> float:
    """By what `up` is multiplied where `scale` stands for the given alpha / rank; exactly 1 if they are equal."""
    own = given.alpha / given.down.shape[0]
    return 1.0 if math.isclose(own, scale, rel_tol=1e-6) else own / scale
