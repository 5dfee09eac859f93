"""Modules that run when they are used, not when they are imported.

A stand-in takes a module's place among the imported ones. It runs the module when the first thing of it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Known = Callable[["Later"], Any]  # makes what a stand-in has for one of its module's names


class Later(ModuleType):
    """In place of a module that has not run yet. Its class becomes that of a module when it runs.

    importlib's LazyLoader also runs it for a look at `__file__`, which `inspect` gives to all modules.
    """

    later_inside: bool
    later_known: Mapping[str, Known]
    later_after: Callable[[ModuleType], None]

    def __getattr__(self, name: str) -> Any:
        if name in self.later_known:
            made = self.later_known[name](self)
            setattr(self, name, made)
            return made
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if self.later_inside and PathFinder.find_spec(f"{self.__name__}.{name}", list(self.__path__)):
            return importlib.import_module(f"{self.__name__}.{name}")
        return getattr(ran(self), name)


class _Replaced(ModuleType):
    """A module that put another one into its place when it ran; who imported this one finds all of that."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules[self.__name__], name)


class Named:
    """A class or function of a module that has not run, where it was imported. Nothing is an instance of it yet."""

    def __init__(self, module: ModuleType, name: str) -> None:
        self._module, self._name = module, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._real()(*args, **options)

    def __instancecheck__(self, thing: object) -> bool:
        return not waits(self._module) and isinstance(thing, self._real())

    def __subclasscheck__(self, kind: type) -> bool:
        return not waits(self._module) and issubclass(kind, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __or__(self, other: Any) -> Any:
        return self._real() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._real()

    def _real(self) -> Any:
        return getattr(ran(self._module), self._name)


def named(name: str) -> Known:
    """Has a class or function known before its module runs."""
    return lambda module: Named(module, name)


def elsewhere(module: str, name: str) -> Known:
    """Has a name known that a package takes from another module: only that one is imported."""
    return lambda _: getattr(importlib.import_module(module), name)


def put_off(
    name: str,
    *,
    inside: bool = False,
    known: Mapping[str, Known] | None = None,
    after: Callable[[ModuleType], None] = lambda _: None,
) -> None:
    """Has a module run when the first thing of it is asked for. What runs already, or is not installed, stays so.

    Args:
        inside: the package does not run when a module in it is imported, as it otherwise does.
        known: what can be had of it before it runs; what it has itself takes the place of these.
        after: is called with the module when it has run.
    """
    if name in sys.modules:
        return
    spec = _spec(name)
    if spec is None or spec.loader is None:
        return
    if _Running not in sys.meta_path:
        sys.meta_path.insert(0, _Running)
    module = Later(name)
    module.later_inside, module.later_known, module.later_after = inside, known or {}, after
    module.__spec__, module.__file__, module.__loader__, module.__package__ = (
        spec,
        spec.origin,
        spec.loader,
        spec.parent,
    )
    if spec.submodule_search_locations is not None:
        module.__path__ = spec.submodule_search_locations
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)


def waits(module: ModuleType | None) -> bool:
    """Whether it is put off and has not run."""
    return isinstance(module, Later)


def ran(module: ModuleType) -> ModuleType:
    """The module, which has run or is running; what it is in runs first."""
    name, spec = module.__name__, module.__spec__
    parent = name.rpartition(".")[0]
    if isinstance(module, Later) and parent:
        ran(importlib.import_module(parent))
    if isinstance(module, Later) and spec is not None and spec.loader is not None:  # its package may have used it
        known, after = module.later_known, module.later_after
        for key in ("later_inside", "later_known", "later_after", *(set(known) & set(vars(module)))):
            delattr(module, key)
        module.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
        spec.loader.exec_module(module)
        if sys.modules[name] is not module:
            module.__class__ = _Replaced  # pyright: ignore[reportAttributeAccessIssue]
        after(sys.modules[name])
    return sys.modules[name]


def _spec(name: str) -> ModuleSpec | None:
    """Where a module is, without running the packages that it is in."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return spec


class _Running:
    """Runs a package that was put off before a module in it is imported."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = sys.modules.get(fullname.rpartition(".")[0])
        if not isinstance(package, Later) or package.later_inside:
            return None
        ran(package)
        done = sys.modules.get(fullname)  # the package imported it: it must not run again
        if done is not None:
            done.__spec__ = ModuleSpec(fullname, _Done(done))  # importlib goes by the module's own
        return done and done.__spec__


class _Done(Loader):
    """Finds a module that ran while it was looked for."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
