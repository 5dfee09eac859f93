"""What a stage made of one picture, kept beside the picture's name and used again only for the very same input.

    <folder>/<name>.png + <name>.png.key     a picture or a mask, with the key and the sha256 of what was written
    <folder>/<name>.<key>.json               a caption or another small answer, with its full key inside
    <folder>/<stage>.<n>.<token>.jsonl       a ledger: what a stage knows of many pictures, a line each

A key is sha256 over the stage's name, version and parameters and over the hashes of its input, so a changed parameter
makes only its own stage anew, and what reads from it. Everything is written beside and renamed: after a kill, or with
two processes on one folder, an entry is there whole or not at all. Deleting any file is safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

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


def kept(path: Path, key: str, make: Callable[[], bytes]) -> str:
    """sha256 of the file at `path`, after `make` filled it, if it had to.

    A file that was changed or cut off since is made again.
    """
    record = path.with_name(path.name + ".key")
    before = _object(record)
    if before.get("key") == key and path.is_file():
        found = digest(path.read_bytes())
        if before.get("sha256") == found:
            return found
    content = make()
    atomic_write(path, content, durable=False)
    atomic_write(record, json.dumps({"key": key, "sha256": digest(content)}) + "\n", durable=False)
    return digest(content)


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


class Ledger(AbstractContextManager["Ledger"]):
    """What a stage knows of each picture by its name; for tens of thousands, where a file each would be slow.

    It is only a hint: whoever asks compares the key in it and looks whether the file is the one it speaks of. Each
    process adds lines to a file of its own, so that two at once cannot mix them; the last line of a name counts.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self._folder, self._stage = folder, stage
        self._known: dict[str, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None
        files = sorted(folder.glob(f"{stage}.[0-9]*.jsonl"))  # oldest first
        self._next = 1 + max((int(match[0]) for path in files if (match := re.search(r"\d+", path.name))), default=0)
        for path in files:
            for line in _lines(path):
                self._known[line["name"]] = line

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, name: str) -> dict[str, Any] | None:
        return self._known.get(name)

    def put(self, name: str, what: Mapping[str, Any]) -> None:
        """Says something new of a picture. After a kill only the last line may be missing."""
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            token = f"{self._next:06d}.{os.getpid():x}{secrets.token_hex(4)}"
            self._file = (self._folder / f"{self._stage}.{token}.jsonl").open("ab", buffering=0)
        line = {"name": name, **what}
        self._known[name] = line
        self._file.write(json.dumps(line).encode() + b"\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a ledger's file that have a name; what was cut off or spoilt is left out."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # cleaned meanwhile
        return
    for line in content.splitlines():
        try:
            value: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(cast("dict[str, Any]", value).get("name"), str):
            yield cast("dict[str, Any]", value)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when it is missing or no such thing, which makes the entry anew."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._")[:60] or "empty"
