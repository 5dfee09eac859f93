"""Where the project's own loggers speak: on stderr while a door is open, in RUN/log.txt while a run is."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer import progress

NAMES = ("trainer", "preprocess")


class _Console(logging.StreamHandler[Any]):
    """Lines above the progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def hush_libraries(*, bars: bool = True) -> None:
    """Silences what libraries note about parts that are not used here; their errors still show.

    Called by doors, before the libraries are imported: they read the environment then. Without `bars` they draw no
    progress either.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("xformers", "bitsandbytes"):  # their kernels for this machine are optional
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def shown() -> Generator[None]:
    """Inside, the log is on stderr. On a terminal the bar stands for the progress lines."""
    handler = _Console()
    handler.setFormatter(logging.Formatter("%(message)s"))
    if sys.stderr.isatty():
        handler.addFilter(lambda record: record.name != progress.LOGGER)
    loggers = [logging.getLogger(name) for name in NAMES]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@contextmanager
def silent() -> Generator[None]:
    """Inside, the log is nowhere, nor are bars: another process shows them."""
    loggers = [logging.getLogger(name) for name in NAMES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        raise  # called inside an except block: a full disk stops the run like any other write


@contextmanager
def logged(path: Path) -> Generator[None]:
    """What the project's own loggers say goes to RUN/log.txt as well."""
    handler = _LogFile(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    loggers = [logging.getLogger(name) for name in NAMES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        with suppress(OSError):  # a full disk has been reported by the write that met it
            handler.close()
