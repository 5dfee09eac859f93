"""Finds a part by name: a table entry, `package.module:attr`, or `file.py:attr`.

A table is a plain dict `name -> "module:attr"`, so importing it imports no part.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from trainer import lean


class PartError(ValueError):
    """A spec that names no part. The message says what was given and what is allowed."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that `name` was probably meant to be, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.55)
    return found[0] if found else None


def load(table: Mapping[str, str], spec: str, kind: str, *, code: bool = True) -> Any:
    """The object that `spec` names.

    Args:
        table: the room's own parts, name -> "module:attr".
        spec: a name of the table, `my_pkg.mod:Thing`, or `my_part.py:Thing`.
        kind: what is being looked for, as the message should call it ("model.family").
        code: False refuses specs with a colon, which import code that the caller chose.

    Raises:
        PartError: the name is unknown, the module cannot be found, or it has no such attribute.
    """
    if spec in table:
        return _attribute(table[spec], kind)
    if ":" not in spec:
        meant = nearest(spec, table)
        hint = f"; did you mean {meant}?" if meant else ""
        raise PartError(f"{kind} {spec!r} is unknown{hint} (allowed: {_allowed(table, code=code)})")
    if not code:
        raise PartError(f"{kind} {spec!r} would import code, which is refused here (allowed: {', '.join(table)})")
    return _attribute(spec, kind)


def _allowed(table: Mapping[str, str], *, code: bool) -> str:
    names = ", ".join(table)
    return f"{names}, module:attr or file.py:attr" if code else names


def _attribute(spec: str, kind: str) -> Any:
    where, _, name = spec.rpartition(":")
    module = _from_file(Path(where), kind) if where.endswith(".py") else _from_name(where, kind)
    if not hasattr(module, name):
        meant = nearest(name, (n for n in vars(module) if not n.startswith("_")))
        hint = f"; did you mean {meant}?" if meant else ""
        raise PartError(f"{kind} {spec!r}: {where} has no {name!r}{hint}")
    return getattr(module, name)


def _from_name(where: str, kind: str) -> ModuleType:
    try:
        with lean.importing():
            return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise PartError(f"{kind}: there is no module {where!r} on the Python path") from error
        raise  # the module exists, and something that it imports does not


class _Compiled(SourceFileLoader):
    """Compiles a file whenever it is loaded, and leaves nothing beside it.

    Python knows bytecode that it kept from that of a changed file by its second and size alone.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _from_file(path: Path, kind: str) -> ModuleType:
    if not path.is_file():
        raise PartError(f"{kind}: there is no file {str(path)!r}")
    name = f"tempera_part_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Compiled(name, str(path)))
    if spec is None or spec.loader is None:
        raise PartError(f"{kind}: {str(path)!r} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up here
    spec.loader.exec_module(module)
    return module
