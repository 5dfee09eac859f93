"""Batches that the memory holds: one that it does not is tried again in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from preprocess.types import PreprocessError

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Fitting:
    """Runs batches whole, or in parts. A part's size that did not fit is not tried again."""

    def __init__(self, at_once: int, section: str = "data.caption_model") -> None:
        self._at_once, self._section = at_once, section

    def __call__(self, count: int, run: Callable[[slice], Sequence[T]]) -> list[T]:
        """`count` answers, from `run` on one part of the batch after the other.

        Raises:
            PreprocessError: the memory does not hold even one.
        """
        done: list[T] = []
        while len(done) < count:
            part = slice(len(done), min(count, len(done) + self._at_once))
            answers = self._tried(part, run)
            if answers is not None:
                done += answers
        return done

    def _tried(self, part: slice, run: Callable[[slice], Sequence[T]]) -> Sequence[T] | None:
        import torch

        size: int = part.stop - part.start
        try:
            return run(part)
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise PreprocessError(
                    f"the memory of the device does not hold the model and one input; set {self._section}.device to "
                    "cpu, a narrower dtype where there is that option, or a smaller model"
                ) from error
        # Only here, with the error gone, nothing names the tensors of the batch any more.
        torch.cuda.empty_cache()
        self._at_once = size // 2
        _log.warning("the memory does not hold %d at once: going on with %d", size, self._at_once)
        return None
