"""What a stage made of one picture, kept beside the picture's name and used again only for the very same input.

    <folder>/<name>.png + <name>.png.key     a picture or a mask, with the key and the sha256 of what was written
    <folder>/<name>.<key>.json               a caption or another small answer, with its full key inside

A key is sha256 over the stage's name, version and parameters and over the hashes of its input, so a changed parameter
makes only its own stage anew, and what reads from it. Everything is written beside and renamed: after a kill, or with
two processes on one folder, an entry is there whole or not at all. Deleting any file is safe.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from trainer.rundir import atomic_write


@dataclass(frozen=True)
class StageKey:
    """What a stage's answers depend on besides their input."""

    name: str
    version: int
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])  # as JSON

    def of(self, *inputs: str) -> str:
        """64 hex digits for these inputs: hashes of content, or texts."""
        parts = [self.name, self.version, self.parameters, inputs]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest(content: bytes) -> str:
    """sha256 of content, in hex digits."""
    return hashlib.sha256(content).hexdigest()


def kept(path: Path, key: str, make: Callable[[], bytes]) -> tuple[str, bool]:
    """(sha256 of the file at `path`, whether it was there already) after `make` filled it, if it had to.

    A file that was changed or cut off since is made again.
    """
    record = path.with_name(path.name + ".key")
    before = _object(record)
    if before.get("key") == key and path.is_file():
        found = digest(path.read_bytes())
        if before.get("sha256") == found:
            return found, True
    content = make()
    atomic_write(path, content, durable=False)
    atomic_write(record, json.dumps({"key": key, "sha256": digest(content)}) + "\n", durable=False)
    return digest(content), False


def remembered(folder: Path, name: str, key: str, make: Callable[[], Any]) -> Any:
    """The JSON value that `make` gives for `key`: from the disk when it is there, else made and written.

    Args:
        name: of the picture, for people who look into the folder; it plays no part in finding the right answer.
    """
    path = folder / f"{_slug(name)}.{key[:16]}.json"
    before = _object(path)
    if before.get("key") == key and "value" in before:
        return before["value"]
    value = make()
    atomic_write(path, json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")
    return value


def remembered_all(
    folder: Path, wanted: Sequence[tuple[str, str]], make: Callable[[list[int]], Sequence[Any]]
) -> list[Any]:
    """As `remembered` for many at once, for stages that work in batches: `make` gets the indices that are missing.

    Args:
        wanted: (name, key) of each answer.
    """
    absent = object()
    found: list[Any] = []
    for name, key in wanted:
        before = _object(folder / f"{_slug(name)}.{key[:16]}.json")
        found.append(before["value"] if before.get("key") == key and "value" in before else absent)
    missing = [index for index, value in enumerate(found) if value is absent]
    if missing:
        for index, value in zip(missing, make(missing), strict=True):
            name, key = wanted[index]
            found[index] = remembered(folder, name, key, lambda value=value: value)
    return found


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when it is missing or no such thing, which makes the entry anew."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._")[:60] or "empty"
