"""The other end of a crew: a process that works on what comes over its stdin and answers over its stdout."""

from __future__ import annotations

import logging
import os
import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

_LENGTH = struct.Struct("<Q")


@dataclass
class Outcome:
    """What came of one task: a value or what was raised, and what was logged meanwhile."""

    value: Any = None
    raised: Exception | None = None
    logged: list[tuple[str, int, str]] = field(default_factory=list[tuple[str, int, str]])  # logger, level, message


def send(pipe: IO[bytes], message: Any) -> None:
    """Writes one message, with its length before it."""
    content = pickle.dumps(message)
    pipe.write(_LENGTH.pack(len(content)))
    pipe.write(content)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """The next message.

    Raises:
        EOFError: the other end is gone.
    """
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError("the other end is gone")
    (length,) = _LENGTH.unpack(head)
    content = pipe.read(length)
    if len(content) < length:
        raise EOFError("the other end is gone")
    return pickle.loads(content)  # noqa: S301  written by our own other end, never by a file


def told(outcome: Outcome) -> Any:
    """The value of a task, as if it had been worked on here: what was logged is logged, what was raised is raised."""
    for logger, level, message in outcome.logged:
        logging.getLogger(logger).log(level, "%s", message)
    if outcome.raised is not None:
        raise outcome.raised
    return outcome.value


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.levelno, record.getMessage()))


def serve() -> None:
    """Works until stdin closes."""
    tasks = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    kept = _Kept()
    logger = logging.getLogger("preprocess")
    logger.setLevel(logging.INFO)
    logger.addHandler(kept)
    logger.propagate = False
    while True:
        try:
            function, chunk = receive(tasks)
        except EOFError:
            return
        outcomes: list[Outcome] = []
        for task in chunk:
            outcomes.append(_done(function, task, kept))
            if outcomes[-1].raised is not None:
                break
        try:
            send(answers, outcomes)
        except BrokenPipeError:
            return


def _done(function: Callable[[Any], Any], task: Any, kept: _Kept) -> Outcome:
    outcome = Outcome()
    kept.lines = outcome.logged
    try:
        outcome.value = function(task)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        outcome.raised = error
    return outcome
