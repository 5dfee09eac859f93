"""LoHa and LoKr, products of small matrices that reach a higher rank than LoRA's (LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha import LoHaModel
from peft.tuners.lokr import LoKrModel
from torch import Tensor, nn

from trainer.adapters.drops import Drops
from trainer.adapters.layered import NAME, expect, put
from trainer.adapters.targets import Target
from trainer.adapters.tuned import Tuned, at
from trainer.updates import LohaTensors, LokrTensors, Update

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class Lycoris(Tuned):
    """What both share."""

    def _drop_ranks(self, layer: Any, drops: Drops) -> None:
        """Rows of W' - W, one for each output channel, as LyCORIS has it; its product has no ranks to leave out."""
        whole: Callable[..., Tensor] = layer.get_delta_weight

        def some(name: str, **options: Any) -> Tensor:
            change = whole(name, **options)
            return change * drops.kept(change, [len(change), *[1] * (change.ndim - 1)]) if layer.training else change

        layer.get_delta_weight = some


class LoHa(Lycoris):
    """The elementwise product of two low-rank matrices (arXiv 2108.06098): rank r^2 for the price of 2 r."""

    def _model(self, root: nn.Module, targets: Sequence[Target]) -> Any:
        config = LoHaConfig(
            r=self.args.rank,
            alpha=self.alpha,  # pyright: ignore[reportArgumentType]  # PEFT says int and takes any number
            target_modules=[target.path for target in targets],
            rank_pattern=self._ranks(targets),
            alpha_pattern=self._alphas(targets),
        )
        return LoHaModel(root, config, NAME)

    def _tensors(self, layer: Any) -> dict[str, nn.Parameter]:
        return {name: at(getattr(layer, name)) for name in LOHA}

    def _update(self, layer: Any) -> Update:
        w1_a, w1_b, w2_a, w2_b = self._tensors(layer).values()
        return LohaTensors(w1_a, w1_b, w2_a, w2_b, float(layer.alpha[NAME]))

    def _copy(self, layer: Any, update: Update) -> None:
        given: LohaTensors = expect(update, LohaTensors, "loha")
        own = self._tensors(layer)
        put(own["hada_w1_a"], given.w1_a, given.alpha / given.w1_b.shape[0] / layer.scaling[NAME])
        put(own["hada_w1_b"], given.w1_b)
        put(own["hada_w2_a"], given.w2_a)
        put(own["hada_w2_b"], given.w2_b)

    def _factors(self, layer: Any) -> list[nn.Parameter]:
        return list(self._tensors(layer).values())


class LoKr(Lycoris):
    """The Kronecker product of a small matrix and of a larger one, which is of low rank if it is large enough."""

    ranked = False  # a rank above a factor's width means that the factor is whole
    pace = 4.0  # at a LoRA's own it hardly moves (docs/benchmarks.md)

    def _model(self, root: nn.Module, targets: Sequence[Target]) -> Any:
        config = LoKrConfig(
            r=self.args.rank,
            alpha=self.alpha,  # pyright: ignore[reportArgumentType]  # PEFT says int and takes any number
            decompose_factor=self.args.factor,
            target_modules=[target.path for target in targets],
            rank_pattern=self._ranks(targets),
            alpha_pattern=self._alphas(targets),
        )
        return LoKrModel(root, config, NAME)

    def _tensors(self, layer: Any) -> dict[str, nn.Parameter]:
        return {name: at(getattr(layer, name)) for name in LOKR if NAME in getattr(layer, name)}

    def _update(self, layer: Any) -> Update:
        own = self._tensors(layer)
        w1, w2 = (tuple(t for name, t in own.items() if name.startswith(start)) for start in ("lokr_w1", "lokr_w2"))
        return LokrTensors(w1, w2, float(layer.alpha[NAME]) / layer.r[NAME])

    def _copy(self, layer: Any, update: Update) -> None:
        given: LokrTensors = expect(update, LokrTensors, "lokr")
        own = self._factors(layer)
        if len(own) != len(given.w1) + len(given.w2):
            raise ValueError("it is factored otherwise; are rank and adapter.factor equal?")
        first, *rest = (*given.w1, *given.w2)
        put(own[0], first, given.scale / layer.scaling[NAME])
        for parameter, tensor in zip(own[1:], rest, strict=True):
            put(parameter, tensor)

    def _factors(self, layer: Any) -> list[nn.Parameter]:
        return list(self._tensors(layer).values())
