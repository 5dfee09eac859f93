"""The safetensors container: opened a tensor at a time, written a tensor at a time, so that a file never needs to fit.

A file is 8 bytes with the length of a JSON header, the header (tensor -> dtype, shape, place), then the numbers.
Unlike `safe_open` nothing is mapped into memory, and what is wrong with a file is said in a sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor

from trainer.rundir import atomic_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HASHES = {"modelspec.hash_sha256": "0x", "sshs_model_hash": ""}  # of all bytes after the header: key -> what precedes
UNKNOWN = "0" * 64  # a hash whose numbers are not written yet
LONGEST_HEADER = 100_000_000  # bytes, as in safetensors itself


class LayoutError(ValueError):
    """A file that cannot be written, read or used here. One sentence."""


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0  # bytes after the header

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Opened:
    """A .safetensors file whose header was read and checked; tensors are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            LayoutError: it is no such file, or is damaged.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self.entries, self.metadata, self._data = _header(path, file, path.stat().st_size)
        except OSError as error:
            raise LayoutError(f"{path} cannot be read: {error.strerror}") from error

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors, in the order of the header."""
        return iter(self.entries)

    def tensor(self, key: str) -> Tensor:
        """A tensor of its own memory."""
        entry = self.entries[key]
        if not entry.size:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = bytearray(entry.size)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._data + entry.start)
            view, done = memoryview(data), 0
            while done < entry.size:  # one read gives at most 2 GiB
                count = file.readinto(view[done:])
                if not count:
                    raise LayoutError(f"{self.path} became shorter while it was read")
                done += count
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)

    def finite(self, key: str) -> Tensor:
        """`tensor`, in which no number is NaN or infinite.

        Raises:
            LayoutError: one is.
        """
        tensor = self.tensor(key)
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise LayoutError(f"{self.path} holds numbers that are NaN or infinite, in {key} for one")
        return tensor


def _header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Entry], dict[str, str], int]:
    first = file.read(8)
    begins = file.read(1) == b"{"
    if not begins and (wrong := _other_kind(first)):  # a header's length may look like the mark of another kind
        raise LayoutError(f"{path} is {wrong} and no .safetensors file; nothing of it was read")
    if len(first) < 8:
        raise LayoutError(f"{path} has {len(first)} bytes, which is no .safetensors file")
    length = int.from_bytes(first, "little")
    if length > LONGEST_HEADER:
        raise LayoutError(f"{path} begins with a header of {length:,} bytes; it is damaged or no .safetensors file")
    if 8 + length > size:
        raise LayoutError(f"{path} is cut off: its header has {length:,} bytes, and the file {size:,}")
    try:
        file.seek(8)
        found: Any = json.loads(file.read(length).decode("utf-8"))
        metadata: Any = found.pop("__metadata__", {})
        entries = {str(key): _entry(said) for key, said in found.items()}
        metadata = {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LayoutError(f"the header of {path} is damaged ({error}); it is no .safetensors file") from error
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise LayoutError(f"the header of {path} is damaged: {key} is not where the tensor before it ends")
        end += entry.size
    if 8 + length + end != size:
        how = "cut off" if 8 + length + end > size else "damaged"
        raise LayoutError(f"{path} is {how}: its tensors need {8 + length + end:,} bytes, and the file has {size:,}")
    return entries, metadata, 8 + length


def _entry(said: Mapping[str, Any]) -> Entry:
    shape = tuple(int(side) for side in said["shape"])
    start, end = (int(place) for place in said["data_offsets"])
    if said["dtype"] not in DTYPES:
        raise ValueError(f"the dtype {said['dtype']!r} is unknown")
    entry = Entry(DTYPES[said["dtype"]], shape, start)
    if min(shape, default=0) < 0 or start < 0 or end - start != entry.size:
        raise ValueError(f"shape {list(shape)} of {said['dtype']} does not take bytes {start} to {end}")
    return entry


def _other_kind(first: bytes) -> str | None:
    if first.startswith(b"PK"):
        return "a zip, as torch.save makes them of pickles,"
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, which could run code when it is read,"
    if first.startswith(b"<"):
        return "a web page"
    return None


def write(
    path: Path, entries: Mapping[str, Entry], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Writes a file with `tensors` as they come, which is the order of `entries`; beside, then renamed; mode 0644.

    Only one tensor is held at a time. What was there before stays until the new file is whole. Hashes of the numbers
    (the keys of HASHES) are made anew where `metadata` has their keys, whatever it says of them.

    Raises:
        ValueError: a tensor is not the one that `entries` has in its place.
        OSError: nothing is left behind.
    """
    said = {key: HASHES[key] + UNKNOWN if key in HASHES else value for key, value in metadata.items()}
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        _write_header(file, entries, said)
        names = iter(entries)
        for key, tensor in tensors:
            entry = entries.get(key)
            if key != next(names, None) or entry is None:
                raise ValueError(f"{key} is not the tensor that comes next")
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{key} is {list(tensor.shape)} of {tensor.dtype}, and was announced as {entry}")
            if entry.size:
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                digest.update(data)
        if missing := list(names):
            raise ValueError(f"{len(missing)} tensors were announced and did not come, {missing[0]} first")
        if found := {key: start + digest.hexdigest() for key, start in HASHES.items() if key in said}:
            file.seek(0)
            _write_header(file, entries, {**said, **found})


def write_all(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write` of tensors that are all there."""
    entries = {key: Entry(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    write(path, entries, tensors.items(), metadata)


def _write_header(file: IO[bytes], entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    header = _packed(entries, metadata)
    file.write(len(header).to_bytes(8, "little") + header)


def _packed(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    said: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for key, entry in entries.items():
        said[key] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.size],
        }
        start += entry.size
    header = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
