"""Where each file of a run lives. Nothing else joins these paths."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_CHECKPOINT = re.compile(r"step_(\d{6,})")


class RunDirError(ValueError):
    """A run directory that exists already, or that is none. One sentence for the person at the door."""


@dataclass(frozen=True)
class RunDir:
    """The paths of one run. Constructing it makes nothing; `create` and `open` touch the disk."""

    root: Path

    @classmethod
    def create(cls, root: Path) -> RunDir:
        """A new, empty run directory; what exists is never overwritten."""
        try:
            root.mkdir(parents=True)
        except FileExistsError as error:
            raise RunDirError(
                f"{root} exists already and a run is never overwritten: choose another --runtime.name, "
                f"or continue it with --resume {root}"
            ) from error
        except OSError as error:
            raise RunDirError(f"the run directory {root} cannot be made: {error.strerror}") from error
        return cls(root)

    @classmethod
    def open(cls, root: Path) -> RunDir:
        """The run directory that a run left behind."""
        if not root.is_dir():
            raise RunDirError(f"{root} is not a folder, so it is no run directory")
        run = cls(root)
        if not run.args.is_file():
            raise RunDirError(f"{root} is no run directory: it has no {run.args.name}")
        return run

    @property
    def args(self) -> Path:
        return self.root / "args.json"

    @property
    def env(self) -> Path:
        return self.root / "env.json"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset.jsonl"

    @property
    def skipped(self) -> Path:
        """What was left out of the dataset: one JSON object a line, `file` and `reason`."""
        return self.root / "skipped.jsonl"

    @property
    def survey(self) -> Path:
        """What preprocessing made of the source: `pictures`, and sentences in `facts` and `problems`."""
        return self.root / "survey.json"

    def sheet(self, page: int = 1) -> Path:
        """The contact sheet: what training sees of each picture. Long ones have more pages, counted from 1."""
        return self.root / ("sheet.html" if page == 1 else f"sheet_{page}.html")

    def sheet_image(self, page: int = 1) -> Path:
        """The same page as one picture."""
        return self.sheet(page).with_suffix(".png")

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def kept(self) -> Path:
        """What stages know of single pictures: ledgers of `preprocess.stagecache`."""
        return self.cache / "kept"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def stopped(self) -> Path:
        """Only of a run that a hook ended before its last step: `step`, `of`, `by`, `reason`."""
        return self.root / "stopped.json"

    @property
    def choice(self) -> Path:
        """Only where hooks.best chooses what is exported: `best`, a step, and `looks`, figures of each checkpoint."""
        return self.root / "choice.json"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def grid(self) -> Path:
        return self.samples / "grid.png"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """Finished checkpoints, oldest first. A name is given only once the folder is complete."""
        if not self.checkpoints.is_dir():
            return []
        named = ((_CHECKPOINT.fullmatch(path.name), path) for path in self.checkpoints.iterdir() if path.is_dir())
        return sorted((int(match.group(1)), path) for match, path in named if match)

    def newest_checkpoint(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest finished checkpoint, or None."""
        complete = self.complete_checkpoints()
        return complete[-1] if complete else None


def atomic_write(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Writes `data` beside `path` and renames it: a reader sees the old file or the new one, whole.

    Args:
        durable: also after a power cut. False is faster, for files whose reader checks them.

    Raises:
        OSError: nothing is left behind, and what was there before still is.
    """
    with atomic_file(path, durable=durable) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Generator[IO[bytes]]:
    """The same for a file that is written piece by piece inside; an error inside leaves what was there before."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, and runs are shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """A folder beside `path` to fill; at the end it takes that name. What was there before goes only then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp gives 0700
        before = temporary.with_name(f"{temporary.name}.before")
        if path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
        shutil.rmtree(before, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that holds one a line. A last line that was cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RunDirError(f"{path} line {number} is not JSON: {error.msg}") from error
