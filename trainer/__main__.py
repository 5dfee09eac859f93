"""The training door: python train.py, or python -m trainer.

Exit status: 0; 2 for input that cannot be used; 1 for a run that failed, or a dry run that found problems; 130 when
it was stopped by Ctrl-C or SIGTERM (after a checkpoint, once there is anything to save).
"""

from __future__ import annotations

import errno
import json
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from trainer import cli, console
from trainer.registry import PartError
from trainer.rundir import RunDir, RunDirError

if TYPE_CHECKING:
    from trainer.run import Session

BAD_INPUT, FAILED, STOPPED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says; the exit status."""
    try:
        command = cli.parse(sys.argv[1:] if argv is None else argv)
        if command.print_args:
            print(_printed(command))
            return 0
    except (cli.CommandError, RunDirError) as error:
        return _said(error, BAD_INPUT)
    with console.shown(), _Stop() as stop:
        try:
            return _train(command, stop)
        except KeyboardInterrupt:
            print("stopped; nothing newer than the last checkpoint was kept", file=sys.stderr)
            return STOPPED


def _train(command: cli.Command, stop: _Stop) -> int:
    console.hush_libraries()
    from preprocess import PreprocessError  # after --help and the args: these imports take seconds
    from trainer.checkpoint import CheckpointError
    from trainer.dataset import DatasetError
    from trainer.export import ExportError
    from trainer.loop import NonFiniteLoss
    from trainer.run import RunError
    from trainer.types import BaseModelError

    where = command.resume
    try:
        if command.dry_run:
            return _rehearsed(command)
        with _session(command) as session:
            where = session.dir.root
            return _follow(session, stop)
    except (RunDirError, RunError, BaseModelError, PreprocessError, DatasetError, PartError) as error:
        return _said(error, BAD_INPUT)
    except (NonFiniteLoss, CheckpointError, ExportError) as error:
        return _said(error, FAILED, where)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        at = f" while {error.filename} was written" if error.filename else ""
        return _said(OSError(f"the disk is full{at}; make room"), FAILED, where)


def _rehearsed(command: cli.Command) -> int:
    from trainer.rehearsal import rehearse

    assert command.args is not None  # a dry run is of a new run
    found = rehearse(command.args)
    print("\n".join([*found.facts, *(f"problem: {problem}" for problem in found.problems)]))
    return FAILED if found.problems else 0


def _session(command: cli.Command) -> AbstractContextManager[Session]:
    from trainer import run

    if command.resume is not None:
        return run.resumed(command.resume, command.args)
    assert command.args is not None  # only a plain --resume has none
    return run.opened(command.args)


def _follow(session: Session, stop: _Stop) -> int:
    """Consumes the steps; a wish to stop is granted between two of them."""
    for step in session.steps():
        stop.at_once = step.step == session.run.steps  # its checkpoint is written, and what follows can be redone
        if stop.asked:
            print(f"stopped at step {step.step}: {session.checkpoint(step.step)}", file=sys.stderr)
            print(f"continue with: python train.py --resume {session.dir.root}", file=sys.stderr)
            return STOPPED
    print(f"grid    {session.dir.grid}\nreport  {session.dir.report}\nfiles   {session.dir.export}")
    return 0


class _Stop:
    """Ctrl-C and SIGTERM: asked for once, granted between updates; asked for twice, or outside updates, at once."""

    def __init__(self) -> None:
        self.asked = False
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
