"""One function over many pictures: in several processes and on several ranks, in order, with what is in flight bounded.

Work starts in this process; only when it would go on for a while are workers started. They are new interpreters, not
forks: whatever threads, devices or models this process holds, they know nothing of them. Each reads tasks from its
stdin and ends when that closes, so none outlives this process, however it dies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from preprocess import worker
from preprocess.types import PreprocessError
from trainer.progress import Progress
from trainer.rundir import atomic_write
from trainer.share import ALONE, Share

PATIENCE_S = 1.0  # work in this process that long, and see how far it comes
START_S = 3.0  # seconds of work that must be left for workers to be worth their start
CHUNK_S = 0.1  # seconds of work handed over at once: less is spent on talking, more on waiting for the last
CHUNK_TASKS = 64
CHUNK_BYTES = 4 * 2**20
IN_FLIGHT_BYTES = 64 * 2**20  # of content that was read and is not yet worked on; one larger file goes alone

_SERVE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from preprocess.worker import serve; serve()"

T = TypeVar("T")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Crew(AbstractContextManager["Crew"]):
    """The workers of one preprocessing; none is there before it is needed, all are gone at the end.

    Args:
        workers: processes [default: one for each core that this process may use]; with 0 and 1 all is done here.
        share: of several ranks: each does its part of the tasks and reads what the others made of theirs.
        scratch: folder that all ranks see.
    """

    def __init__(self, workers: int | None = None, share: Share = ALONE, scratch: Path | None = None) -> None:
        self.share = share
        self._count = max(1, cores() // share.here) if workers is None else workers
        self._scratch = scratch
        self._workers: list[_Worker] = []

    def __exit__(self, *exception: object) -> None:
        for one in self._workers:
            one.kill()
        self._workers.clear()

    def map(
        self,
        what: str,
        function: Callable[[T], Any],
        tasks: Sequence[T],
        *,
        name: Callable[[T], str],
        pack: Callable[[T], tuple[T, int]] | None = None,
        done: Callable[[T, Any], None] | None = None,
    ) -> list[Any]:
        """The function's values, in the order of the tasks.

        Args:
            what: is being done, for people: `decoding`.
            tasks: the same on all ranks.
            function: of a module, or a partial of one; its value must be JSON.
            name: of a task, for the message when it kills its worker.
            pack: the task as it can go to another process, and how many bytes it holds.
            done: called here with each task of this rank and its value, in order.

        Raises:
            PreprocessError: a worker died, or another rank failed.
            OSError, ValueError, ...: what the function raised, at the first task that did.
        """
        mine = self.share.of(tasks)
        values: list[Any] = []
        try:
            with Progress(what, len(mine), "picture") as progress:
                for value in self._values(function, mine, name, pack or _as_it_is):
                    if done:
                        done(mine[len(values)], value)
                    values.append(value)
                    progress.advance()
        except Exception as error:
            self._tell(what, 0, {"failed": f"{type(error).__name__}: {error}"})
            raise
        return self._tell(what, len(tasks), {"values": values}) if self.share.processes > 1 else values

    def local(self, function: Callable[[T], Any], tasks: Sequence[T], *, name: Callable[[T], str]) -> list[Any]:
        """As `map` for a few tasks of this rank alone, without a word; values need not be JSON."""
        return list(self._values(function, tasks, name, _as_it_is))

    def _values(
        self,
        function: Callable[[T], Any],
        tasks: Sequence[T],
        name: Callable[[T], str],
        pack: Callable[[T], tuple[T, int]],
    ) -> Iterator[Any]:
        began, here = time.monotonic(), 0
        while here < len(tasks):
            spent = time.monotonic() - began
            left_s = spent / max(here, 1) * (len(tasks) - here)
            known = bool(self._workers) or spent >= PATIENCE_S
            if self._count > 1 and len(tasks) - here > 1 and known and left_s >= (0 if self._workers else START_S):
                break
            yield function(tasks[here])
            here += 1
        if here < len(tasks):
            each_s = (time.monotonic() - began) / here if here else CHUNK_S / 8
            yield from self._spread(function, tasks[here:], name, pack, most=max(1, int(CHUNK_S / max(each_s, 1e-6))))

    def _spread(
        self,
        function: Callable[[T], Any],
        tasks: Sequence[T],
        name: Callable[[T], str],
        pack: Callable[[T], tuple[T, int]],
        most: int,
    ) -> Iterator[Any]:
        """Chunks of tasks go to whichever worker is free; what comes first waits for what is before it."""
        while len(self._workers) < min(self._count, len(tasks)):
            self._workers.append(_Worker())
        idle = deque(self._workers)
        flight: deque[tuple[Future[list[worker.Outcome]], Sequence[T], int]] = deque()
        begun = flying = 0
        with ThreadPoolExecutor(len(self._workers)) as talking:
            try:
                while begun < len(tasks) or flight:
                    while begun < len(tasks) and len(flight) < 2 * len(self._workers) and flying < IN_FLIGHT_BYTES:
                        packed, size = _chunk(tasks, begun, min(most, CHUNK_TASKS), pack)
                        part = tasks[begun : begun + len(packed)]
                        future = talking.submit(_asked, idle, function, packed, [name(task) for task in part])
                        flight.append((future, part, size))
                        begun, flying = begun + len(part), flying + size
                    future, part, size = flight.popleft()
                    outcomes = future.result()
                    flying -= size
                    for outcome in outcomes:
                        yield worker.told(outcome)
            except BaseException:  # Ctrl-C too: nobody waits for what nobody wants
                self.__exit__()
                raise

    def _tell(self, what: str, count: int, told: dict[str, Any]) -> list[Any]:
        """Gives the other ranks what came of this one's part; the `count` values of the whole."""
        share = self.share
        if share.processes == 1:
            return []
        assert self._scratch is not None
        paths = [self._scratch / f"{what}.{rank}.json" for rank in range(share.processes)]
        try:
            atomic_write(paths[share.rank], json.dumps(told), durable=False)
        finally:
            share.barrier()
        if "failed" in told:
            return []
        values: list[Any] = [None] * count
        for rank, path in enumerate(paths):
            part = _heard(path, rank)
            if len(part) != len(values[rank :: share.processes]):
                raise PreprocessError(f"rank {rank} found another number of pictures than rank {share.rank}")
            values[rank :: share.processes] = part
        share.barrier()
        paths[share.rank].unlink(missing_ok=True)
        return values


def _heard(path: Path, rank: int) -> list[Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PreprocessError(
            f"rank {rank} left nothing at {path}: all ranks must see the same folder of the run"
        ) from error
    if "failed" in told:
        raise PreprocessError(f"rank {rank} failed: {told['failed']}")
    return told["values"]


def _as_it_is(task: T) -> tuple[T, int]:
    return task, 0


def _chunk(tasks: Sequence[T], begin: int, most: int, pack: Callable[[T], tuple[T, int]]) -> tuple[list[T], int]:
    packed: list[T] = []
    held = 0
    while len(packed) < min(most, len(tasks) - begin) and held < CHUNK_BYTES:
        task, size = pack(tasks[begin + len(packed)])
        packed.append(task)
        held += size
    return packed, held


def _asked(
    idle: deque[_Worker], function: Callable[[Any], Any], tasks: Sequence[Any], names: Sequence[str]
) -> list[worker.Outcome]:
    one = idle.popleft()  # there are as many as threads
    try:
        return one.ask(function, tasks, names)
    finally:
        idle.append(one)


class _Worker:
    def __init__(self) -> None:
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # there is a worker for each core
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | one_thread,
            start_new_session=True,  # Ctrl-C is for this process, which then ends its workers
        )

    def ask(self, function: Callable[[Any], Any], tasks: Sequence[Any], names: Sequence[str]) -> list[worker.Outcome]:
        pipes = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        try:
            worker.send(pipes[0], (function, list(tasks)))
            return worker.receive(pipes[1])
        except (OSError, EOFError) as error:
            status = self._process.wait()
            how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
            more = f" or one of the next {len(names) - 1}" if len(names) > 1 else ""
            raise PreprocessError(
                f"a worker process of preprocessing ended {how} at {names[0]}{more}; when memory ran out, "
                "set data.workers to fewer"
            ) from error

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                cast("IO[bytes]", pipe).close()
