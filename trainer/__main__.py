"""The training door: python train.py, or python -m trainer.

Exit status: 0; 2 for input that cannot be used; 1 for a run that failed, or a dry run that found problems; 130 when
it was stopped by Ctrl-C or SIGTERM (after a checkpoint, once there is anything to save).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from trainer import cli, console, lean, ranks
from trainer.registry import PartError
from trainer.rundir import RunDir, RunDirError

if TYPE_CHECKING:
    from trainer.run import Session

BAD_INPUT, FAILED, STOPPED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says; the exit status."""
    try:
        command = cli.parse(sys.argv[1:] if argv is None else argv)
        alone, first = ranks.launched()[1] == 1, ranks.launched()[0] == 0
        if command.print_args:
            if first:
                print(_printed(command))
            return 0
        if command.dry_run and not alone:
            raise cli.CommandError("--dry-run measures one process: start it without the launcher")
    except (cli.CommandError, RunDirError, ranks.RanksError) as error:
        return _said(error, BAD_INPUT) if os.environ.get("RANK", "0") == "0" else BAD_INPUT
    try:
        with (
            ranks.joined() as here,
            console.shown() if here.first else console.silent(),
            _Stop(here) as stop,
        ):
            try:
                return _train(command, stop, here)
            except KeyboardInterrupt:
                if here.fails(STOPPED):
                    print("stopped; nothing newer than the last checkpoint was kept", file=sys.stderr)
                return STOPPED
            except ranks.OtherFailed as other:  # which says why
                return other.status
    except ranks.RanksError as error:
        return _said(error, FAILED)


def _train(command: cli.Command, stop: _Stop, here: ranks.Ranks) -> int:
    console.hush_libraries(bars=here.first)
    lean.start()
    with lean.importing():  # after --help and the args: these take seconds
        from preprocess import PreprocessError
        from trainer.checkpoint import CheckpointError
        from trainer.dataset import DatasetError
        from trainer.events import HookError
        from trainer.export import ExportError
        from trainer.hooks.checkpoints import Drifted
        from trainer.loop import NonFiniteLoss
        from trainer.optim.moved import NeverMoved
        from trainer.run import RunError
        from trainer.types import BaseModelError

    where = command.resume

    def said(error: Exception, status: int, where: Path | None = None) -> int:
        return _said(error, status, where) if here.fails(status) else status

    try:
        if command.dry_run:
            return _rehearsed(command)
        with _session(command, here) as session:
            where = session.dir.root
            return _follow(session, stop)
    except (RunDirError, RunError, BaseModelError, PreprocessError, DatasetError, PartError) as error:
        return said(error, BAD_INPUT)
    except NeverMoved as error:  # all updates are done: there is nothing to go on with
        return said(error, FAILED)
    except (NonFiniteLoss, CheckpointError, ExportError, Drifted, HookError, ranks.RanksError) as error:
        return said(error, FAILED, where)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        at = f" while {error.filename} was written" if error.filename else ""
        return said(OSError(f"the disk is full{at}; make room"), FAILED, where)


def _rehearsed(command: cli.Command) -> int:
    from trainer.rehearsal import rehearse

    assert command.args is not None  # a dry run is of a new run
    found = rehearse(command.args)
    print("\n".join([*found.facts, *(f"problem: {problem}" for problem in found.problems)]))
    return FAILED if found.problems else 0


def _session(command: cli.Command, here: ranks.Ranks) -> AbstractContextManager[Session]:
    from trainer import run

    if command.resume is not None:
        return run.resumed(command.resume, command.args, here=here)
    assert command.args is not None  # only a plain --resume has none
    return run.opened(command.args, here=here)


def _follow(session: Session, stop: _Stop) -> int:
    """Consumes the steps; a wish to stop is granted between two of them."""
    for step in session.steps():
        stop.at_once = step.step == session.run.steps  # its checkpoint is written, and what follows can be redone
        if session.agreed(stop.asked):
            path = session.checkpoint(step.step)
            if session.here.first:
                print(f"stopped at step {step.step}: {path}", file=sys.stderr)
                print(f"continue with: python train.py --resume {session.dir.root}", file=sys.stderr)
            return STOPPED
    if session.here.first:
        print(f"grid    {session.dir.grid}\nreport  {session.dir.report}\nfiles   {session.dir.export}")
    return 0


class _Stop:
    """Ctrl-C and SIGTERM: asked for once, granted between updates; asked for twice, or outside updates, at once."""

    def __init__(self, here: ranks.Ranks) -> None:
        self.asked, self._here = False, here
        self.at_once = True  # until the first update is done there is nothing to save

    def __enter__(self) -> _Stop:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # signals are the main thread's alone
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self.at_once:
            raise KeyboardInterrupt
        self.asked = True
        self._here.stopping()
        if self._here.first:
            print("\nstopping after this update; once more to stop at once", file=sys.stderr)


def _said(error: Exception, status: int, where: Path | None = None) -> int:
    print(f"train.py: error: {error}", file=sys.stderr)
    newest = RunDir(where).newest_checkpoint() if where else None
    if newest:
        print(f"the newest good checkpoint is {newest[1]}; go on with --resume {where}", file=sys.stderr)
    return status


def _printed(command: cli.Command) -> str:
    if command.args is not None:
        return json.dumps(command.args.model_dump(mode="json"), indent=2, ensure_ascii=False)
    assert command.resume is not None
    return RunDir.open(command.resume).args.read_text(encoding="utf-8").rstrip()


if __name__ == "__main__":
    sys.exit(main())
