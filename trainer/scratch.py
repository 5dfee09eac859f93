"""Temporary folders of a server: found again and emptied, whoever left them."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from pathlib import Path

_OURS = re.compile(r"tempera-(\d+)-")
_SPILLED = "coglet/predictions/*/outputs/spill_*.json"  # answers of more than 6 MiB, which Cog writes and leaves
_FAILED = "tmp????????*"  # where Cog meant to put a URL; it leaves an empty file of one that it could not fetch
_OLD_S = 600.0  # seconds after which nobody uses one of those any more


def folder() -> Path:
    """A new temporary folder that `sweep` knows."""
    return Path(tempfile.mkdtemp(prefix=f"tempera-{os.getpid()}-"))


def sweep() -> None:
    """Deletes the folders of this process and of those that are gone, at a moment when none of this process is used.

    A server reads its answer from a file after the function that made it has returned, so the file goes with the next
    request.
    """
    top = Path(tempfile.gettempdir())
    for path in top.glob("tempera-*"):
        owner = _OURS.match(path.name)
        if owner and (int(owner[1]) == os.getpid() or not _alive(int(owner[1]))):
            shutil.rmtree(path, ignore_errors=True)
    empty = [path for path in top.glob(_FAILED) if path.is_file() and path.stat().st_size == 0]
    for path in (*top.glob(_SPILLED), *empty):
        if time.time() - path.stat().st_mtime > _OLD_S and path.stat().st_uid == os.getuid():
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
