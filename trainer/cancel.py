"""Work beside the thread of a request, so that whatever ends the request ends the work at a good moment.

Cog cancels a request by an exception at whatever line its thread is. Here that thread only waits.
"""

from __future__ import annotations

import contextvars
import ctypes
import threading
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

GRACE_S, LAST_S = 1.5, 60.0  # seconds to end at a good moment; seconds that the next work waits for one that did not

T = TypeVar("T")


class StillEndingError(RuntimeError):
    """Work that was ended before is inside one long computation and has not noticed yet."""


class Work(threading.Thread, Generic[T]):
    """Runs `job(self)` in a thread of its own, one at a time in a process.

    The job sets `whole` when it should be left to finish what it is at, and then looks at `asked` now and then; where
    it has not set it, it is interrupted (KeyboardInterrupt) at any line.
    """

    _last: ClassVar[Work[object] | None] = None

    def __init__(self, job: Callable[[Work[T]], T]) -> None:
        if Work._last is not None and not Work._last._done.wait(LAST_S):
            raise StillEndingError("the request that was cancelled before is still ending; try again in a minute")
        super().__init__(name="work", daemon=True)
        self._job, self._context = job, contextvars.copy_context()  # Cog's scope is in the context
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._done = threading.Event()
        self.asked = threading.Event()
        self.whole = False
        Work._last = self  # pyright: ignore[reportAttributeAccessIssue]

    def run(self) -> None:
        try:
            self._results.append(self._context.run(self._job, self))
        except BaseException as error:  # noqa: BLE001  it is raised again where somebody waits
            self._error = error
        finally:
            self._done.set()

    def result(self) -> T:
        """What the job gave or raised. An exception that comes to the waiting thread ends the work, and goes on."""
        try:
            self.start()
            while not self._done.wait(0.05):  # short: an exception reaches a thread between two of its lines
                pass
        except BaseException:
            self.stop()
            raise
        if self._error is not None:
            raise self._error
        return self._results[0]

    def stop(self) -> None:
        """Ends it within two seconds: at a good moment, or else anywhere."""
        self.asked.set()
        if self.whole:
            self._done.wait(GRACE_S)
        if not self._done.is_set() and self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(KeyboardInterrupt))
            self._done.wait(0.3)
