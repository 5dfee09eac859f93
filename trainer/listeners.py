"""Who listens to what in a run: tells hooks of events in their order, and names the one that fails.

Hooks that do nothing at an event are sorted out at its first time, so that it costs nothing to have many events.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from trainer.events import (
    Event,
    Gradients,
    HookError,
    NoiseDrawn,
    PredictionMade,
    Stopped,
    TimestepsDrawn,
    hears,
)
from trainer.ranks import OtherFailed, RanksError
from trainer.types import Cond, Probe, Step

log = logging.getLogger(__name__)

_Event = TypeVar("_Event", bound=Event)


class Stop(NamedTuple):
    """A wish that all processes agreed on."""

    by: str
    reason: str


class Listeners:
    """The hooks of one run, in the order of its args."""

    def __init__(self, run: Any, hooks: Sequence[Any]) -> None:
        """`run` is the loop's, or None while there is none: then only `say` works."""
        self._run, self._hooks = run, hooks
        self._of: dict[str, list[Any]] = {}

    def __call__(self, event: _Event) -> _Event:
        """The event after every hook that hears it, with what they changed in it.

        Raises:
            HookError: a hook raised, or answered what cannot be.
        """
        for hook in self._hearing(event.heard_by):
            answer = _called(hook, event.heard_by, self._run, event)
            if answer is None:
                continue
            if not isinstance(event, Gradients):
                self._check_alone(hook, event.heard_by)
            try:
                event = event.answered(answer)
            except (TypeError, ValueError) as error:
                raise HookError(f"the hook {name_of(hook)} failed at {event.heard_by}: {error}") from error
        return event

    def say(self, name: str, *what: Any) -> None:
        """Calls the method of that name of every hook that has it."""
        for hook in self._hearing(name):
            _called(hook, name, *what)

    def probe(self, update: int, turn: int) -> Probe | None:
        """For the objective's batch; None when no hook hears of what it tells."""
        kinds = (TimestepsDrawn, NoiseDrawn, PredictionMade)
        return _Probe(self, update, turn) if any(self._hearing(kind.heard_by) for kind in kinds) else None

    def stop(self, step: Step) -> Stop | None:
        """The first wish of any hook on any process to end the run after this step."""
        wishes: list[tuple[str, str]] = []
        hooks = self._hearing("wants_stop")
        for hook in hooks:
            self._check_alone(hook, "wants_stop")
            reason = _called(hook, "wants_stop", self._run, step)
            if reason is not None:
                wishes.append((name_of(hook), str(reason)))
        if not hooks:
            return None
        agreed = next((wish[0] for wish in self._run.engine.gathered([wishes[:1]]) if wish), None)
        if agreed is None:
            return None
        stop = Stop(*agreed)
        log.warning("%s ended the run after step %d of %d: %s", stop.by, step.step, self._run.steps, stop.reason)
        return stop

    def stopped(self, step: int, stop: Stop) -> None:
        """Tells that the run ends here."""
        self(Stopped(step, stop.by, stop.reason))

    def _hearing(self, name: str) -> list[Any]:
        if name not in self._of:
            self._of[name] = [hook for hook in self._hooks if hears(hook, name)]
        return self._of[name]

    def _check_alone(self, hook: Any, name: str) -> None:
        if self._run.engine.processes > 1 and not getattr(hook, "everywhere", False):
            raise HookError(
                f"the hook {name_of(hook)} failed at {name}: it changes the run on one of "
                f"{self._run.engine.processes} processes alone; set everywhere = True in its class"
            )


class _Probe:
    """One batch's observer: what the objective tells becomes events."""

    def __init__(self, tell: Listeners, update: int, turn: int) -> None:
        self._tell, self._update, self._turn = tell, update, turn

    def timesteps(self, t: Tensor) -> Tensor:
        return self._tell(TimestepsDrawn(self._update, self._turn, t)).t

    def noise(self, eps: Tensor) -> Tensor:
        return self._tell(NoiseDrawn(self._update, self._turn, eps)).eps

    def prediction(self, pred: Tensor, xt: Tensor, t: Tensor, cond: Cond, target: Tensor) -> Tensor:
        return self._tell(PredictionMade(self._update, self._turn, pred, xt, t, cond, target)).pred


def name_of(hook: Any) -> str:
    """As the args name it."""
    return str(getattr(hook, "name", type(hook).__name__))


def _called(hook: Any, name: str, *what: Any) -> Any:
    """What the hook answers.

    Raises:
        HookError: from whatever it raised, but for errors that speak for themselves: those of its `own_errors`, and
            those of other processes.
    """
    try:
        return getattr(hook, name)(*what)
    except (HookError, RanksError, OtherFailed, *getattr(hook, "own_errors", ())):
        raise
    except Exception as error:
        raise HookError(f"the hook {name_of(hook)} failed at {name}: {type(error).__name__}: {error}") from error
