"""How far something long is: a bar with the time left on a terminal, and a plain line now and then in the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm

LOGGER = "trainer.progress"  # on a terminal `trainer.console` leaves its lines to the bar

_log = logging.getLogger(LOGGER)


class Progress(AbstractContextManager["Progress"]):
    """Counts from `done` to `total`. What is over within `after_s` seconds is not spoken of.

    Args:
        what: is going on, as the bar and the lines begin: `decoding`.
        unit: one of what is counted: `picture`.
        after_s: seconds until the first word.
        every_s: seconds between two lines in the log.
    """

    def __init__(
        self, what: str, total: int, unit: str, *, done: int = 0, after_s: float = 2.0, every_s: float = 10.0
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._start = done
        self._after, self._every = after_s, every_s
        self._began = time.monotonic()
        self._said = float("-inf")  # when the last line was
        self._bar: Any = None
        if not after_s:
            self._show(done)

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def left_s(self) -> float:
        """Seconds until the end, at the mean speed so far."""
        return self.elapsed_s / max(self.done - self._start, 1) * (self.total - self.done)

    def advance(self, count: int = 1, *, note: str = "", line: Callable[[], str] | None = None) -> None:
        """So much more is done.

        Args:
            note: what the bar says besides.
            line: writes the line of the log [default: `self.line`].
        """
        self.done += count
        now = time.monotonic()
        if now - self._began < self._after:
            return
        self._show(self.done - count)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        if self.done >= self.total:
            self.close()
        if now - self._said >= self._every or self.done >= self.total:
            self._said = now
            _log.info("%s", (line or self.line)())

    def _show(self, done: int) -> None:
        seen = sys.stderr.isatty() and _log.isEnabledFor(logging.CRITICAL)  # a log that is silenced has no bar
        if self._bar is None and seen and self._start < self.total:
            self._bar = tqdm(total=self.total, initial=done, unit=self.unit, desc=self.what, smoothing=0.05)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def line(self) -> str:
        """`decoding 1200/50000  350.1 pictures/s  2:19 left`."""
        speed = (self.done - self._start) / max(self.elapsed_s, 1e-9)
        return f"{self.what} {self.done}/{self.total}  {speed:.1f} {self.unit}s/s  {clock(self.left_s)} left"


def clock(seconds: float) -> str:
    """`0:52`, `12:05` or `2:03:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
