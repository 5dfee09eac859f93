"""Runs of a server that did not end, in the folder TEMPERA_KEPT (runs/kept), to be gone on with.

A run is in a folder of its own there from its first moment, so one whose server was killed is there as well.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import tarfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from trainer import callers
from trainer.args import TrainArgs
from trainer.dataset import read_manifest
from trainer.rundir import RunDir

KEEP = 4  # runs; older ones are deleted
NAME = "lora"  # of a run, and so of its files
_NAME = re.compile(r"[a-z0-9-]{1,64}")

log = logging.getLogger(__name__)


class KeptError(ValueError):
    """What was given cannot be gone on with. One sentence."""


def top() -> Path:
    return Path(os.environ.get("TEMPERA_KEPT", "runs/kept"))


def new() -> Path:
    """The folder of a new run, which is not made yet; the run in it is called NAME."""
    return top() / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


@contextmanager
def until_done(folder: Path, *, brought: bool = False) -> Generator[None]:
    """Around a run in `folder`: when it is done the folder is gone; else it stays if it can be gone on with.

    Args:
        brought: the caller has it, too, so a failure that added nothing leaves nothing.
    """
    before = _state(folder, stopped=False) if brought else None
    try:
        yield
    except BaseException as error:
        state = _state(folder, stopped=not isinstance(error, Exception))
        if state is None or (brought and isinstance(error, Exception) and state == before):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            log.warning("kept at %s; go on with resume_from %s", state, folder.name)
            _prune()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _state(folder: Path, *, stopped: bool) -> str | None:
    """How far the run in `folder` is, or None of one that is not worth keeping."""
    runs = _runs(folder)
    if not runs:
        return None
    newest = RunDir(runs[0]).newest_checkpoint()
    if newest:
        return f"step {newest[0]}"
    return "its first step, with its pictures prepared" if stopped else None


def _prune() -> None:
    """Each holds its pictures, so only the newest stay."""
    kept = sorted((path for path in top().iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in kept[:-KEEP]:
        shutil.rmtree(path, ignore_errors=True)


def found(given: object) -> tuple[Path, Path, TrainArgs]:
    """(folder, run directory, its args) of a tar that was downloaded, which is unpacked, or of a name of one kept here.

    Raises:
        KeptError: it is neither, or leads to files outside of itself.
    """
    if isinstance(given, os.PathLike):
        folder = new()
        try:
            _unpack(Path(given), folder)
            return folder, *_checked(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    name = str(given)
    if not _NAME.fullmatch(name) or not (top() / name).is_dir():
        raise KeptError(
            f"resume_from {name!r} is neither a tar (a URL or an upload) nor a run that this server kept; the log of a "
            "run that was cancelled says its name"
        )
    return top() / name, *_checked(top() / name)


def _unpack(path: Path, folder: Path) -> None:
    """Plain files only, none of which leads out of the folder, and no more than a download may hold."""
    limits = callers.LIMITS
    try:
        with tarfile.open(path) as tar:
            entries = [entry for entry in tar.getmembers() if entry.isreg()]
            if len(entries) > 10 * limits.entries or sum(entry.size for entry in entries) > limits.total_bytes:
                _refuse(f"it holds {len(entries)} files, or more than {limits.total_bytes} bytes")
            tar.extractall(folder, entries, filter="data")
    except (tarfile.TarError, OSError) as error:
        _refuse(str(error), error)


def _runs(folder: Path) -> list[Path]:
    return [path.parent for path in sorted(folder.rglob("args.json")) if RunDir(path.parent).dataset.is_file()]


def _checked(folder: Path) -> tuple[Path, TrainArgs]:
    """The run in `folder`. What a caller packed may name no file outside it."""
    runs = _runs(folder)
    if len(runs) != 1:
        _refuse("it must hold the folder of one run that was cancelled, with its args.json and dataset.jsonl")
    run = RunDir(runs[0])
    args = TrainArgs.model_validate(json.loads(run.args.read_text(encoding="utf-8")))
    inside = run.root.resolve()
    for item in read_manifest(run.dataset):
        for file in (item.file, item.mask):
            if file is not None and not file.resolve().is_relative_to(inside):
                _refuse(f"its dataset.jsonl names {file.name}, which is outside the run")
    return run.root, args


def _refuse(why: str, error: Exception | None = None) -> NoReturn:
    raise KeptError(f"resume_from cannot be used: {why}") from error
