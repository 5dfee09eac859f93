"""This process among those that a launcher (torchrun, accelerate launch) started to make one run together.

They meet in the store that the launcher names (MASTER_ADDR, MASTER_PORT): a few bytes by name, over TCP. Words travel
through it as JSON; gradients do not. Whoever fails leaves a note there, so that the others stop waiting and are silent:
the person reads one sentence. Without a launcher there is one process, and torch is not imported.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from trainer.share import Share

BEAT_S = 5.0  # between two signs of life
SILENT_S = 300.0  # without one, a process is given up: some calls of libraries keep all threads waiting for long
STOP_S = 20.0  # that waiting may last once the launcher has said to stop: it kills what is left after 30 s
LEAVE_S = 10.0  # that the last ones have for seeing why the first one left


class RanksError(RuntimeError):
    """The processes of a run cannot find or have lost one another. One sentence."""


class OtherFailed(Exception):  # noqa: N818  it names what happened
    """Another process failed and has said why; this one has only to end with the same `status`."""

    def __init__(self, status: int) -> None:
        super().__init__(f"another process of this run failed with status {status}")
        self.status = status


def launched(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, processes) as the launcher says; (0, 1) without one.

    Raises:
        RanksError: WORLD_SIZE says that there are several, but not which of them this is and where they meet.
    """
    processes = environ.get("WORLD_SIZE", "1")
    if processes in ("", "1"):
        return 0, 1
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environ.get(name)]
    if missing or not processes.isdecimal() or not environ["RANK"].isdecimal():
        raise RanksError(
            f"the environment says WORLD_SIZE={processes}, but {', '.join(missing) or 'no number in it'} is missing; "
            "start several processes with torchrun or accelerate launch, or one without WORLD_SIZE"
        )
    return int(environ["RANK"]), int(processes)


class Ranks:
    """Process `rank` of `processes`. Calls that wait are made by all of them, in the same order."""

    def __init__(self, rank: int = 0, processes: int = 1, store: Any = None) -> None:
        self.rank, self.processes = rank, processes
        self.store = store  # torch.distributed's, None for one process
        self._round = 0
        self._stopped: float | None = None
        self._done = threading.Event()

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """This process's part of work that is done by all."""
        here = os.environ.get("LOCAL_WORLD_SIZE", "1") if self.processes > 1 else "1"
        return Share(self.rank, self.processes, self.barrier, int(here))

    def barrier(self) -> None:
        """Returns when all processes have called it."""
        self.gathered([])

    def gathered(self, rows: Sequence[Any]) -> list[Any]:
        """The rows of all processes, as JSON gives them back: everybody's first row by rank, then the second, ...

        Args:
            rows: as many on every process.

        Raises:
            OtherFailed: another process has failed.
            RanksError: another process has been silent for SILENT_S.
        """
        if self.processes == 1:
            return list(rows)
        number, self._round = self._round, self._round + 1
        with self.heard():
            self.store.set(f"rows/{number}/{self.rank}", json.dumps(rows))
            self.store.add(f"met/{number}", 1)
            self._wait(f"met/{number}")
            names = [f"rows/{number}/{rank}" for rank in range(self.processes)]
            parts = [json.loads(text) for text in self.store.multi_get(names)]
            if number:  # all have read the rows of the meeting before, as they have come to this one
                self.store.delete_key(f"rows/{number - 1}/{self.rank}")
        return [row for place in zip(*parts, strict=True) for row in place]

    def stopping(self) -> None:
        """Says that this process was told to stop; so were the others, if they live."""
        self._stopped = time.monotonic()

    def fails(self, status: int) -> bool:
        """Notes that this process ends with `status`; True if it is the first to, so that it says why."""
        if self.processes == 1:
            return True
        note = json.dumps([self.rank, status])
        try:
            return self.store.compare_set("failed", "", note).decode() == note
        except RuntimeError:  # the store is gone, and with it everybody who could have spoken
            return self.first

    @contextmanager
    def heard(self) -> Generator[None]:
        """Inside, a connection that breaks off (a RuntimeError of torch) is told as what it means."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RanksError):
                raise
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> Exception:
        """What to raise when talking to the others failed with `error`: a process that ends breaks its connections."""
        with suppress(RuntimeError):
            for _ in range(20):  # its note may be on its way
                if self.store.check(["failed"]):
                    return OtherFailed(json.loads(self.store.get("failed"))[1])
                time.sleep(0.1)
        return RanksError(
            f"rank {self.rank} of {self.processes} has lost the others ({str(error).splitlines()[0]}); one of them was "
            "killed or its machine cannot be reached: see the launcher's messages, and go on with --resume"
        )

    def _wait(self, count: str) -> None:
        """Returns when the counter has reached all processes."""
        pause = 0.0005
        began = looked = time.monotonic()
        beats: dict[int, tuple[int, float]] = {}
        while self.store.add(count, 0) < self.processes:
            if self.store.check(["failed"]):
                raise OtherFailed(json.loads(self.store.get("failed"))[1])
            if self._stopped is not None and time.monotonic() - max(began, self._stopped) > STOP_S:
                raise RanksError(
                    f"rank {self.rank} of {self.processes} was told to stop, and others gave no answer; they were "
                    "killed, or an update takes long: go on from the newest checkpoint with --resume"
                )
            if time.monotonic() - looked > BEAT_S:
                looked = time.monotonic()
                self._listen(beats, looked)
            time.sleep(pause)
            pause = min(0.02, 1.5 * pause)

    def _listen(self, beats: dict[int, tuple[int, float]], now: float) -> None:
        for rank in range(self.processes):
            heard = self.store.add(f"beat/{rank}", 0)
            if rank not in beats or beats[rank][0] != heard:
                beats[rank] = heard, now
            elif now - beats[rank][1] > SILENT_S:
                raise RanksError(
                    f"rank {rank} of {self.processes} has given no sign of life for {SILENT_S:.0f} s; it hangs, was "
                    "killed, or its machine cannot be reached: start the processes again"
                )

    def beat(self) -> None:
        """Gives signs of life until `leave`."""
        with suppress(RuntimeError):
            while not self._done.wait(BEAT_S):
                self.store.add(f"beat/{self.rank}", 1)

    def leave(self) -> None:
        """Waits for the others for a moment: the store may live in the first process, and a launcher ends all others
        as soon as one has failed, before they could see why."""
        self._done.set()
        with suppress(ValueError):  # handlers are the main thread's alone
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself, and with its own status
        deadline = time.monotonic() + LEAVE_S
        with suppress(RuntimeError):
            self.store.add("left", 1)
            while self.store.add("left", 0) < self.processes and time.monotonic() < deadline:
                time.sleep(0.02)


@contextmanager
def joined() -> Generator[Ranks]:
    """All processes of this launch, met; a process that ends with an error ends the others too.

    Raises:
        RanksError: they cannot meet.
    """
    rank, processes = launched()
    if processes == 1:
        yield Ranks()
        return
    here = Ranks(rank, processes, _store())
    threading.Thread(target=here.beat, name="beat", daemon=True).start()
    try:
        yield here
    except OtherFailed:
        raise
    except BaseException:
        here.fails(1)
        raise
    finally:
        here.leave()


def _store() -> Any:
    from torch.distributed import PrefixStore, rendezvous

    try:
        store, _, _ = next(rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RanksError(f"the processes cannot meet at {where}: {str(error).splitlines()[0]}") from error
    return PrefixStore("tempera", store)
