"""Forward and backward of single layers, chosen by name: activations, gradients, moves between devices.

Names are those of torch, behind the part that they are in: `denoiser.mid_block.resnets.0`, `text_encoder.final_norm`.
A layer that an adapter was put around has its own name still, and its inside in `base_layer` below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from trainer.events import Attached, hears, unheard
from trainer.hooks import Context, Hook
from trainer.registry import nearest
from trainer.types import ModelFamily


class PatternError(ValueError):
    """A pattern that no layer's name fits. One sentence."""


class LayerHook(Hook):
    """Hears the layers whose name fits a pattern: `*` is any text, dots too, `?` one letter.

    It hears every pass: training, predictions of the frozen model, samples. Only training has gradients on
    (`torch.is_grad_enabled()`). With gradient checkpointing a layer is passed forward twice. What the three methods
    return takes the place of what they were given, None leaves it; only those that are overridden cost anything.
    """

    own_errors = (PatternError,)

    def __init__(self, context: Context, *patterns: str) -> None:
        super().__init__(context)
        self.patterns = patterns
        self._handles: list[RemovableHandle] = []

    @unheard
    def before_forward(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Before the layer is computed; other inputs may be returned, as a tuple."""

    @unheard
    def on_forward(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """After it; another output may be returned."""

    @unheard
    def on_backward(self, name: str, module: nn.Module, gradients: tuple[Any, ...], of_output: tuple[Any, ...]) -> Any:
        """The loss's gradients of the layer's inputs are known; others may be returned, as a tuple.

        A layer that no gradient passes is not heard.
        """

    def on_attached(self, event: Attached) -> None:
        """Listens from here on.

        Raises:
            PatternError: no layer fits one of the patterns.
        """
        kinds = {
            "before_forward": nn.Module.register_forward_pre_hook,
            "on_forward": nn.Module.register_forward_hook,
            "on_backward": nn.Module.register_full_backward_hook,
        }
        for name, module in matching(event.family, self.patterns).items():
            for method, register in kinds.items():
                if hears(self, method):
                    make: Any = register
                    self._handles.append(make(module, _named(getattr(self, method), name)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def matching(family: ModelFamily, patterns: Sequence[str]) -> Mapping[str, nn.Module]:
    """Name -> layer of the denoiser and the text encoders, for every name that fits one of the patterns.

    Raises:
        PatternError: a pattern fits none.
    """
    roots = {"denoiser": family.denoiser, **family.text_encoders}
    layers = {
        f"{root}.{path}" if path else root: module
        for root, inside in roots.items()
        for path, module in inside.named_modules()
    }
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        fits = {name: module for name, module in layers.items() if fnmatchcase(name, pattern)}
        if not fits:
            raise PatternError(f"no layer's name fits {pattern!r}{_hint(pattern, list(layers))}")
        found |= fits
    return found


def _hint(pattern: str, names: Sequence[str]) -> str:
    """Names near to the pattern; a bare word is compared with the last words of names."""
    bare = pattern.replace("*", "")
    near = nearest(bare, names)
    if near is None:
        last = nearest(bare.strip(".").rsplit(".", 1)[-1], {name.rsplit(".", 1)[-1] for name in names})
        near = None if last is None else f"*.{last}"
    return f"; did you mean {near}?" if near else f"; names are such as {', '.join(names[1:4])}"


def _named(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """torch gives the module first; a hook of ours is given its name before it."""

    def call(*what: Any) -> Any:
        return method(name, *what)

    return call
