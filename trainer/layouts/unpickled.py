"""Tensors out of a file of torch.save, read without running it.

Such a file is a zip with one pickle and the numbers beside it. A pickle is a program; here its steps are only listed
(`pickletools.genops`, which calls and imports nothing), and the few that build dictionaries, lists, numbers and
tensors are followed as data. Any other step, and any name outside NAMES, is an error.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from trainer.layouts.container import LayoutError

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
}
NAMES = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    *(f"torch {name}" for name in STORAGES),
}
LARGEST = 64 * 2**20  # bytes of one entry: an embedding has a few hundred KiB
MARK = object()


@dataclass(frozen=True)
class _Name:
    """A name that the pickle wants to import. It stays a name."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """Numbers in an entry of the zip."""

    dtype: torch.dtype
    entry: str
    count: int


def read(path: Path) -> Any:
    """The object of a file of torch.save: dictionaries, lists, numbers, text and tensors.

    Raises:
        LayoutError: it is damaged, is of the older kind, which is no zip, or holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Machine(archive).run()
    except zipfile.BadZipFile as error:
        raise LayoutError(
            f"{path} is no zip as torch.save writes it since 1.6, and older pickles are not read; open it in the "
            "program that made it and save it as .safetensors"
        ) from error
    except (StrangeError, KeyError, IndexError, ValueError, TypeError, RuntimeError, OSError) as error:
        raise LayoutError(
            f"{path} is a pickle with more than tensors in it ({error}); nothing of it was run. Convert it to "
            ".safetensors where you trust it"
        ) from error


class StrangeError(ValueError):
    """What this reader does not follow."""


class _Machine:
    """Follows the steps of a pickle as data."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise StrangeError(f"it has {len(pickles)} entries data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in archive.namelist() and self._entry(order) != b"little":
            raise StrangeError("its numbers are big-endian")
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for step, given, _ in pickletools.genops(self._entry(f"{self._root}data.pkl")):
            if step.name == "STOP":
                return self._stack.pop()
            follow = STEPS.get(step.name)
            if follow is None:
                raise StrangeError(f"the step {step.name}")
            follow(self, given)
        raise StrangeError("it does not end")

    def _entry(self, name: str) -> bytes:
        info = self._archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > LARGEST:
            raise StrangeError(f"its entry {name} is compressed or too large")
        return self._archive.read(name)

    # --- steps; `given` is what stands in the pickle beside the step

    def push(self, given: Any) -> None:
        self._stack.append(given)

    def name(self, given: Any) -> None:
        if given is None:  # STACK_GLOBAL
            attribute, module = self._stack.pop(), self._stack.pop()
            given = f"{module} {attribute}"
        if given not in NAMES:
            raise StrangeError(f"the name {given!r}")
        self._stack.append(_Name(given))

    def marked(self) -> list[Any]:
        at = max(place for place, value in enumerate(self._stack) if value is MARK)
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def put(self, given: Any) -> None:
        self._memo[len(self._memo) if given is None else int(given)] = self._stack[-1]

    def get(self, given: Any) -> None:
        self._stack.append(self._memo[int(given)])

    def tuple_of(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(values)

    def set_items(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise StrangeError("items of what is no dictionary")
        cast(dict[Any, Any], target).update(zip(pairs[::2], pairs[1::2], strict=True))

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.set_items([key, value])

    def append(self, _: Any) -> None:
        value = self._stack.pop()
        self.append_all([value])

    def append_all(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise StrangeError("entries of what is no list")
        cast(list[Any], target).extend(values)

    def storage(self, _: Any) -> None:
        kind, name, entry, _, count = self._stack.pop()
        if kind != "storage" or not isinstance(name, _Name):
            raise StrangeError("a reference to something outside")
        self._stack.append(_Storage(STORAGES[name.text.split()[1]], str(entry), int(count)))

    def call(self, _: Any) -> None:
        arguments, what = self._stack.pop(), self._stack.pop()
        if not isinstance(what, _Name):
            raise StrangeError("a call")
        called = what.text.split()[1]
        if called == "OrderedDict" and not arguments:
            self._stack.append({})
        elif called == "_rebuild_parameter":
            self._stack.append(arguments[0])
        elif called == "_rebuild_tensor_v2":
            self._stack.append(self._tensor(*arguments[:4]))
        else:
            raise StrangeError(f"a call of {what.text}")

    def _tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        data = bytearray(self._entry(f"{self._root}data/{storage.entry}"))
        held = len(data) // storage.dtype.itemsize
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride), default=0) < 0 or not math.prod(size) or last >= held:
            raise StrangeError(f"a tensor {list(size)} outside of its {held} numbers")
        flat = torch.frombuffer(data, dtype=storage.dtype, count=held)
        return flat.as_strided(size, stride, offset).clone()


def _values(*names: str) -> Mapping[str, Callable[[_Machine, Any], None]]:
    return dict.fromkeys(names, _Machine.push)


STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, given: None,
    "FRAME": lambda machine, given: None,
    **_values("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    "NONE": lambda machine, given: machine.push(None),
    "NEWTRUE": lambda machine, given: machine.push(True),
    "NEWFALSE": lambda machine, given: machine.push(False),
    "EMPTY_DICT": lambda machine, given: machine.push({}),
    "EMPTY_LIST": lambda machine, given: machine.push([]),
    "EMPTY_TUPLE": lambda machine, given: machine.push(()),
    "MARK": lambda machine, given: machine.push(MARK),
    "TUPLE": lambda machine, given: machine.push(tuple(machine.marked())),
    "TUPLE1": lambda machine, given: machine.tuple_of(1),
    "TUPLE2": lambda machine, given: machine.tuple_of(2),
    "TUPLE3": lambda machine, given: machine.tuple_of(3),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, given: machine.set_items(machine.marked()),
    "APPEND": _Machine.append,
    "APPENDS": lambda machine, given: machine.append_all(machine.marked()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
}
