"""The composition root: args -> a `Session` that trains, exports and reports. The only room that knows them all."""

from trainer.run.error import RunError
from trainer.run.opening import opened, resumed
from trainer.run.resolving import resolve
from trainer.run.session import Session

__all__ = ["RunError", "Session", "opened", "resolve", "resumed"]
