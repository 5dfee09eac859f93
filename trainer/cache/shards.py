"""Many small entries in few files; each is found by all that it depends on, in whichever shard it is.

    <folder>/<first name>..<last name>.<key>.safetensors    key: 16 hex digits of sha256 over the entries' own keys

A shard holds entries made one after another, and its header what each depends on and which tensors are its own.
Shards are only added, each whole and under a name that says what is in it, so processes may write at once, what is
added to a dataset makes a shard of its own and no other, and deleting any is safe. Their tensors are memory maps:
they take RAM only while the system has some to spare, and no file stays open.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.rundir import atomic_write

log = logging.getLogger(__name__)

ENTRIES = 256  # of a shard, at most; it is also what an interrupted process loses
BYTES = 64 * 2**20

Key = Mapping[str, Any]  # all that an entry depends on, as JSON
Digest = bytes

_OWN = re.compile(r"\.[0-9a-f]{16}\.safetensors$")  # how the name of a shard ends


def digest(key: Key) -> Digest:
    """What an entry is found by."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).digest()


def slug(name: str, most: int = 60) -> str:
    """`name` as a file name that a person recognises: letters, digits, dot, dash, underscore; 1 to `most` bytes."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("._").encode()[:most]
    return plain.decode(errors="ignore") or "empty"


@dataclass(frozen=True)
class _Waiting:
    """An entry of the open shard."""

    name: str
    key: Key
    tensors: dict[str, Tensor]


class _Place(NamedTuple):
    """Where an entry lies."""

    file: Any  # safetensors' handle: a memory map
    tensors: dict[str, str]  # part -> the tensor's name in the file


class Shards:
    """The entries of a folder: those on disk, and those of the open shard, which `flush` writes."""

    def __init__(self, folder: Path, *, entries: int = ENTRIES, size: int = BYTES) -> None:
        """Find what is there.

        Args:
            entries: a shard is closed when it has so many,
            size: or so many bytes.
        """
        self._folder, self._entries, self._size = folder, entries, size
        self._places: dict[Digest, _Place] = {}
        self._seen: set[str] = set()  # files
        self._waiting: dict[Digest, _Waiting] = {}
        self._bytes = 0
        self.scan()

    def scan(self) -> None:
        """Find what other processes have added. A damaged shard is named and deleted: its entries are missing."""
        for path in sorted(self._folder.glob("*.safetensors")):
            if path.name not in self._seen:
                self._take_in(path)

    def __contains__(self, entry: Digest) -> bool:
        return entry in self._waiting or entry in self._places

    def read(self, entry: Digest) -> dict[str, Tensor]:
        """Part -> tensor, on the CPU. They are memory of the file: copy before you write into one.

        Raises:
            KeyError: there is no such entry.
        """
        waiting = self._waiting.get(entry)
        if waiting is not None:
            return waiting.tensors
        place = self._places[entry]
        return {part: place.file.get_tensor(name) for part, name in place.tensors.items()}

    def add(self, name: str, key: Key, tensors: Mapping[str, Tensor]) -> None:
        """Put an entry into the open shard, which is written when that fills it.

        Args:
            name: for people; plays no part in finding the entry.
        """
        own = {
            part: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for part, tensor in tensors.items()
        }
        self._waiting[digest(key)] = _Waiting(name, key, own)
        self._bytes += sum(tensor.nbytes for tensor in own.values())
        if len(self._waiting) >= self._entries or self._bytes >= self._size:
            self.flush()

    def flush(self) -> None:
        """Write the open shard, if anything is in it."""
        if not self._waiting:
            return
        entries = list(self._waiting.values())
        first, last = slug(entries[0].name), slug(entries[-1].name)
        title = first if len(entries) == 1 else f"{first}..{last}"
        content = hashlib.sha256(b"".join(self._waiting)).hexdigest()[:16]
        path = self._folder / f"{title}.{content}.safetensors"
        tensors, listed = _listed(entries)
        atomic_write(path, safetensors.torch.save(tensors, metadata={"entries": json.dumps(listed)}))
        self._waiting, self._bytes = {}, 0
        self._take_in(path)

    def _take_in(self, path: Path) -> None:
        self._seen.add(path.name)
        try:
            file: Any = safe_open(path, framework="pt")
            entries = json.loads((file.metadata() or {}).get("entries", "{}"))
            places = {digest(entry["key"]): _Place(file, entry["tensors"]) for entry in entries.values()}
            named = {name for place in places.values() for name in place.tensors.values()}
            if lacking := named.difference(file.keys()):
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
            self._places |= places
        except FileNotFoundError:
            return  # somebody has just deleted it
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("the cache file %s is damaged, and what it held is made again: %r", path, error)
            if _OWN.search(path.name):
                path.unlink(
                    missing_ok=True
                )  # else every start would name it, as what replaces it may be called otherwise


def _listed(entries: list[_Waiting]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a shard, and what its header says of them: name -> key, part -> tensor."""
    tensors: dict[str, Tensor] = {}
    listed: dict[str, Any] = {}
    for entry in entries:
        name, n = entry.name, 2
        while name in listed:
            name, n = f"{entry.name}~{n}", n + 1
        parts = {part: name if len(entry.tensors) == 1 else f"{name}/{part}" for part in entry.tensors}
        listed[name] = {"key": entry.key, "tensors": parts}
        tensors |= {parts[part]: tensor for part, tensor in entry.tensors.items()}
    return tensors, listed
