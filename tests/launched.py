"""What tests of several processes share: a launcher's command, and what each rank said."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Launch:
    """A launch of two ranks that is over."""

    status: int
    said: list[str]  # stderr of each rank
    printed: list[str]  # stdout of each rank
    launcher: str  # stderr of the launcher itself


def torchrun(logs: Path, *argv: str, ranks: int = 2) -> list[str]:
    """The command: `argv` is a script or `-m module`, with its own arguments."""
    where = ("--log-dir", str(logs), "--redirects", "3")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    return [*launcher, *where, *argv]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def launch(logs: Path, *argv: str) -> Launch:
    """Runs it to its end, for five minutes at most."""
    done = subprocess.run(
        torchrun(logs, *argv), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    return Launch(done.returncode, said(logs, "stderr"), said(logs, "stdout"), done.stderr)


def said(logs: Path, stream: str) -> list[str]:
    """What each rank wrote, by rank."""
    return [path.read_text() for path in sorted(logs.rglob(f"{stream}.log"), key=lambda path: path.parent.name)]
