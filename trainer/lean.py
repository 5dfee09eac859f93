"""A quick start: keeps diffusers, transformers and PEFT from importing what a run may never use, which takes seconds.

For doors, before torch and those are imported. What is put off loads when it is first used; nothing else changes.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

LATER = ("scipy.stats", "scipy.integrate", "bitsandbytes")  # imported by name alone, and used in a few functions
UNUSED = "transformers.loss.loss_utils"  # losses of detectors import scipy.optimize, by `from`, where scipy is there


def start() -> None:
    """What a door does before it imports torch."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin at every barrier stop each other
    imports()


def imports() -> None:
    """Puts off what the libraries would import, where it is installed. Once is enough."""
    later(LATER)
    if UNUSED not in sys.modules and importlib.util.find_spec("scipy") is not None:
        with _absent("scipy"):
            importlib.import_module(UNUSED)
        asked: Any = importlib.import_module("transformers.utils.import_utils").is_scipy_available
        asked.cache_clear()  # it was asked inside


def later(names: Sequence[str]) -> None:
    """Has each module run when the first thing of it is asked for, and not when it is imported."""
    for name in names:
        if name in sys.modules or importlib.util.find_spec(name.partition(".")[0]) is None:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            continue
        module = _Later(name)
        module.__spec__, module.__file__, module.__loader__ = spec, spec.origin, spec.loader
        sys.modules[name] = module


class _Later(ModuleType):
    """A module that runs when it is asked for a name, or for its path, as an import of what is in it does.

    importlib's LazyLoader also runs it for a look at `__file__`, which `inspect` gives to all modules.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
        self.__package__ = spec.parent
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        return getattr(self, name)


@contextmanager
def _absent(package: str) -> Generator[None]:
    """Inside, the package cannot be imported, nor found."""
    modules: dict[str, Any] = sys.modules
    before = modules.get(package)
    modules[package] = None  # what the import system reads as "it is not there"
    try:
        yield
    finally:
        del modules[package]
        if before is not None:
            modules[package] = before
