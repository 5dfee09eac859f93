"""What happens inside a run: one frozen event for each moment, and what a hook's answer to it may change.

An event is heard by the hook's method of its name. An answer of None leaves it as it is; another answer takes the place
of the field that the event says may be changed, and the next hook hears of that.

Shapes: B pictures, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from trainer.types import Batch, Cond, Loss, ModelFamily, Samples

_Method = TypeVar("_Method", bound=Callable[..., Any])


class HookError(RuntimeError):
    """A hook failed. The message names it and the event; what went wrong is the cause."""


def unheard(method: _Method) -> _Method:
    """Marks what a base class does at an event: nothing, so that nobody need call it."""
    vars(method)["unheard"] = True
    return method


def hears(hook: object, name: str) -> bool:
    """Whether the hook does something at the event."""
    method = getattr(hook, name, None)
    return method is not None and not getattr(method, "unheard", False)


@dataclass(frozen=True)
class Event:
    """Base: `heard_by` is the method of hooks, `changes` the field that it may return anew ("" for none)."""

    heard_by: ClassVar[str]
    changes: ClassVar[str] = ""

    def answered(self, answer: Any) -> Self:
        """The event with the answer in it.

        Raises:
            TypeError, ValueError: the answer cannot take the field's place. Who calls says of which hook and event.
        """
        if not self.changes:
            raise TypeError(f"it returned a {type(answer).__name__}, where nothing can be changed: return None")
        _check_like(getattr(self, self.changes), answer)
        return replace(self, **{self.changes: answer})


@dataclass(frozen=True)
class ModelLoaded(Event):
    """The base as it was loaded: before anything of it is cached, and before an adapter is in it."""

    heard_by: ClassVar[str] = "on_model"
    family: ModelFamily
    device: torch.device


@dataclass(frozen=True)
class Attached(Event):
    """The adapters are in the base. Their tensors are those of the start, also in a run that will be resumed."""

    heard_by: ClassVar[str] = "on_attached"
    family: ModelFamily
    components: Mapping[str, Any]  # component -> its (name, parameter) pairs


@dataclass(frozen=True)
class _InMicro(Event):
    """Of one forward and backward."""

    update: int  # counts from 0
    turn: int  # of this micro among those of all processes for this update; randomness is seeded from both


@dataclass(frozen=True)
class PicturesChosen(_InMicro):
    """The dataset chose pictures of one bucket, their versions and captions."""

    heard_by: ClassVar[str] = "on_samples"
    changes: ClassVar[str] = "samples"
    samples: Samples

    @property
    def bucket(self) -> tuple[int, int]:
        """(width, height), latents."""
        return self.samples.latents.shape[-1], self.samples.latents.shape[-2]


@dataclass(frozen=True)
class BatchMade(_InMicro):
    """Text is encoded and all is on the device."""

    heard_by: ClassVar[str] = "on_batch"
    changes: ClassVar[str] = "batch"
    batch: Batch
    samples: Samples  # what it was made of


@dataclass(frozen=True)
class TimestepsDrawn(_InMicro):
    """Noise levels."""

    heard_by: ClassVar[str] = "on_timesteps"
    changes: ClassVar[str] = "t"
    t: Tensor  # [B] on the CPU


@dataclass(frozen=True)
class NoiseDrawn(_InMicro):
    """The noise that pictures will be mixed with, and that the target is made of."""

    heard_by: ClassVar[str] = "on_noise"
    changes: ClassVar[str] = "eps"
    eps: Tensor  # [B, C, H, W]


@dataclass(frozen=True)
class PredictionMade(_InMicro):
    """What the model in training said of (xt, t, cond), with its gradients, and what it should have said."""

    heard_by: ClassVar[str] = "on_prediction"
    changes: ClassVar[str] = "pred"
    pred: Tensor  # [B, C, H, W]
    xt: Tensor
    t: Tensor
    cond: Cond
    target: Tensor


@dataclass(frozen=True)
class LossComputed(_InMicro):
    """Penalties of adapters are not in it yet; nothing is differentiated yet."""

    heard_by: ClassVar[str] = "on_loss"
    changes: ClassVar[str] = "loss"
    loss: Loss
    batch: Batch


@dataclass(frozen=True)
class Gradients(Event):
    """Gradients are summed, over processes too, and not yet clipped: a hook may change them where they are.

    What it returns joins Step.extra.
    """

    heard_by: ClassVar[str] = "on_gradients"
    update: int  # counts from 0
    extra: Mapping[str, float] = field(default_factory=dict)

    def answered(self, answer: Any) -> Self:
        if not isinstance(answer, Mapping):
            raise TypeError(f"it returned a {type(answer).__name__}, and figures are a mapping of name to number")
        twice = sorted(self.extra.keys() & answer.keys())
        if twice:
            raise ValueError(f"it adds {', '.join(twice)} to the metrics, which another hook does already")
        return replace(self, extra={**self.extra, **answer})


@dataclass(frozen=True)
class RatesSet(Event):
    """The learning rate of each component for this update, before the optimizers have it."""

    heard_by: ClassVar[str] = "on_rates"
    changes: ClassVar[str] = "lr"
    update: int  # counts from 0
    lr: Mapping[str, float]

    def answered(self, answer: Any) -> Self:
        if not isinstance(answer, Mapping) or answer.keys() != self.lr.keys():
            raise ValueError(f"it must return a rate for each of {', '.join(self.lr)}, and returned {answer!r}")
        wrong = {name: rate for name, rate in answer.items() if not (math.isfinite(rate) and rate >= 0)}
        if wrong:
            raise ValueError(f"a learning rate is 0 or more, and it returned {wrong}")
        return replace(self, lr=dict(answer))


@dataclass(frozen=True)
class BeforeUpdate(Event):
    """Gradients are clipped and finite, rates are in the optimizers; parameters are about to move."""

    heard_by: ClassVar[str] = "on_before_update"
    update: int  # counts from 0


@dataclass(frozen=True)
class AfterUpdate(Event):
    """Parameters have moved; their gradients are still there."""

    heard_by: ClassVar[str] = "on_after_update"
    update: int  # counts from 0


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint is on the disk, whole."""

    heard_by: ClassVar[str] = "on_checkpoint"
    step: int  # finished updates
    path: Path


@dataclass(frozen=True)
class RowDrawn(Event):
    """Sample pictures were drawn, one for each prompt."""

    heard_by: ClassVar[str] = "on_row"
    row: str  # "before", "step_000100", "after_1"
    files: tuple[Path, ...]
    before: tuple[Path, ...]  # the same prompts and seeds before training


@dataclass(frozen=True)
class Stopped(Event):
    """A hook ended the run before its last update. Samples, export and report follow as at any end."""

    heard_by: ClassVar[str] = "on_stop"
    step: int  # finished updates
    by: str  # the hook
    reason: str


def _check_like(old: Any, new: Any) -> None:
    if not isinstance(new, type(old)):
        raise TypeError(f"it returned a {type(new).__name__} in place of a {type(old).__name__}")
    if isinstance(old, Tensor) and not isinstance(old, nn.Parameter):
        marks = [(list(value.shape), value.dtype, value.device) for value in (old, new)]
        if marks[0] != marks[1]:
            before, after = (f"{shape} {dtype} on {device}" for shape, dtype, device in marks)
            raise ValueError(f"it returned a tensor of {after} in place of {before}")
    if isinstance(new, Loss) and new.total.dim():
        raise ValueError(f"it returned a loss whose total has shape {list(new.total.shape)}, and must be one number")
