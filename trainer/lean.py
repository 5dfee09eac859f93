"""A quick start: keeps diffusers, transformers and PEFT from importing what a run may never use, which takes seconds.

For doors, before torch and those are imported. What is put off loads when it is first used; nothing else changes.
TEMPERA_LEAN=0 in the environment turns all of it off, to see whether it is to blame for something.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from types import FunctionType, ModuleType
from typing import Any

from trainer.later import Known, Later, elsewhere, named, put_off, ran, waits

LATER = ("scipy.stats", "scipy.integrate", "bitsandbytes", "xformers", "xformers.ops")  # imported by name alone
INSIDE = (  # packages that import all that is in them, or read it all to list its names
    "transformers.models",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "diffusers.models.autoencoders",
    "diffusers.hooks",
)
UNUSED = "transformers.loss.loss_utils"  # losses of detectors import scipy.optimize, by `from`, where scipy is there
GUARDS = ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true")
MANY = 100  # modules
TRANSFORMERS: Mapping[str, str] = {  # what is asked of the package on the way to a first step, by module
    "models.clip": "CLIPConfig CLIPImageProcessor CLIPModel CLIPTextModel CLIPTextModelWithProjection CLIPTokenizer "
    "CLIPVisionModel CLIPVisionModelWithProjection",
    "models.siglip": "SiglipImageProcessor SiglipVisionModel",
    "models.auto": "AutoConfig AutoImageProcessor AutoModel AutoModelForCausalLM AutoModelForQuestionAnswering "
    "AutoModelForSeq2SeqLM AutoModelForSequenceClassification AutoModelForTokenClassification AutoTokenizer",
    "models.bloom": "BloomPreTrainedModel",
    "cache_utils": "Cache DynamicCache EncoderDecoderCache",
    "generation": "GenerationConfig GenerationMixin",
    "configuration_utils": "PretrainedConfig",
    "modeling_utils": "PreTrainedModel",
    "tokenization_python": "PreTrainedTokenizer",
}


def start() -> None:
    """What a door does before it imports torch."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin at every barrier stop each other
    if os.environ.get("TEMPERA_LEAN") != "0":
        with importing():
            imports()


def modest() -> bool:
    """Whether this is one process on a machine without an NVIDIA GPU.

    Elsewhere torch's compiler and what spreads tensors over processes may be used, and seconds at the start are nothing
    beside reading a large base: they are imported as ever.
    """
    return not os.path.exists("/proc/driver/nvidia") and os.environ.get("WORLD_SIZE", "1") == "1"


@contextmanager
def importing() -> Generator[None]:
    """Inside, nothing looks for garbage, as modules make much that stays, and what many made is left alone later."""
    on, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - before >= MANY:
            gc.freeze()
        if on:
            gc.enable()


@contextmanager
def undrawn() -> Generator[None]:
    """Inside, no initial values are drawn for tensors that hold none: a model is all shapes until it is read."""
    init: Any = importlib.import_module("torch.nn.init")
    own = {name: made for name, made in vars(init).items() if name.endswith("_") and not name.startswith("_")}

    def spared(draw: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(draw)
        def drawn(tensor: Any, *more: Any, **how: Any) -> Any:
            return tensor if tensor.is_meta else draw(tensor, *more, **how)

        return drawn

    try:
        for name, draw in own.items():
            setattr(init, name, spared(draw))
        yield
    finally:
        for name, draw in own.items():
            setattr(init, name, draw)


def imports() -> None:
    """Puts off what the libraries would import, where it is installed. Once is enough."""
    for name in LATER:
        put_off(name)
    if not isinstance(metadata.packages_distributions, Asked):
        metadata.packages_distributions = Asked(metadata.packages_distributions)
    put_off("bitsandbytes.nn", known={name: named(name) for name in ("Linear8bitLt", "Linear4bit")})  # PEFT asks
    if modest():
        if "torch._dynamo" not in sys.modules:
            _compiler()
        put_off("torch.distributed.tensor", known={"DTensor": named("DTensor")})
    if "transformers" not in sys.modules:
        for name in INSIDE:
            put_off(name, inside=True)
        _transformers()


class Asked:
    """In place of importlib.metadata's packages_distributions, which reads the list of files of all that is installed.

    What it gives is read when something of it is asked for; diffusers takes it at its import, and mostly asks nothing.
    """

    def __init__(self, own: Callable[[], Mapping[str, list[str]]]) -> None:
        self._own = own

    def __call__(self) -> Mapping[str, list[str]]:
        return _Packages(self._own)


class _Packages(Mapping[str, list[str]]):
    """Import name -> the distributions that have it."""

    def __init__(self, own: Callable[[], Mapping[str, list[str]]]) -> None:
        self._own = own

    @functools.cached_property
    def _read(self) -> Mapping[str, list[str]]:
        return self._own()

    def __getitem__(self, name: str) -> list[str]:
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def _compiler() -> None:
    """Puts off what torch.compile needs, which takes a second: decorators and optimizers import it to be left alone."""
    importlib.import_module("torch")
    marks: list[tuple[str, Any]] = []

    def marking(name: str) -> Known:
        return lambda module: functools.partial(_mark, module, name, marks)

    def marked(module: ModuleType) -> None:
        for name, function in marks:
            getattr(module, name)(function)

    known: dict[str, Known] = {name: marking(name) for name in ("allow_in_graph", "assume_constant_result")}
    known |= {"disable": _disable, "graph_break": lambda _: lambda msg="": None}
    put_off("torch._dynamo", known=known, after=marked)
    answers: dict[str, Known] = {name: _guard(name) for name in GUARDS}
    answers |= {"sym_eq": _alike, "is_nested_int": _nested}
    put_off("torch.fx.experimental.symbolic_shapes", known=answers)
    for name, one in (("_trace_wrapped_higher_order_op", "TransformGetItemToIndex"), ("eval_frame", "OptimizedModule")):
        put_off(f"torch._dynamo.{name}", known={one: named(one)})


def _mark(module: ModuleType, name: str, marks: list[tuple[str, Any]], function: Any) -> Any:
    """Tells the compiler something of a function: now, or when it is there."""
    if not (waits(module) and callable(function)):
        return getattr(ran(module), name)(function)
    marks.append((name, function))
    return function


def _disable(module: Later) -> Callable[..., Any]:
    """torch._dynamo.disable: what it returns is the function itself until there is a compiler."""

    def disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        if fn is None:
            return functools.partial(disable, recursive=recursive, **options)
        if not (waits(module) and isinstance(fn, FunctionType)):
            return ran(module).disable(fn, recursive, **options)
        made: list[Callable[..., Any]] = []

        @functools.wraps(fn)
        def disabled(*args: Any, **kwargs: Any) -> Any:
            if waits(module):
                return fn(*args, **kwargs)
            if not made:
                made.append(module.disable(fn, recursive, **options))
            return made[0](*args, **kwargs)

        return disabled

    return disable


def _guard(name: str) -> Known:
    """Asks whether a condition holds: one that is true or false is its own answer, and needs no algebra."""

    def make(module: Later) -> Callable[..., Any]:
        def holds(a: Any, *more: Any, **how: Any) -> Any:
            return a if isinstance(a, bool) else getattr(ran(module), name)(a, *more, **how)

        return holds

    return make


def _alike(module: Later) -> Callable[..., Any]:
    """Compares shapes, without algebra where they are numbers."""

    def sym_eq(x: Any, y: Any) -> Any:
        shapes = [x, y]
        if all(isinstance(side, tuple | list) and all(type(n) is int for n in side) for side in shapes):
            return tuple(x) == tuple(y)
        return ran(module).sym_eq(x, y)

    return sym_eq


def _nested(module: Later) -> Callable[[Any], bool]:
    """A size that is a number is that of no ragged tensor."""
    return lambda size: type(size) is not int and ran(module).is_nested_int(size)


def _transformers() -> None:
    """Puts off the package's own list of its names, for which it reads a thousand files, and what it never does here.

    It spreads models of its own over processes, which Tempera never asks for: in one process, as if torch could not.
    """
    if importlib.util.find_spec("transformers") is None:
        return
    known = {
        name: elsewhere(f"transformers.{module}", name)
        for module, names in TRANSFORMERS.items()
        for name in names.split()
    }
    put_off("transformers", inside=True, known={"__version__": lambda _: metadata.version("transformers"), **known})
    utils: Any = importlib.import_module("transformers.utils")
    asked: Any = importlib.import_module("transformers.utils.import_utils")
    if modest():
        utils.is_torch_distributed_available = asked.is_torch_distributed_available = lambda: False
    utils.direct_transformers_import = _itself
    if importlib.util.find_spec("scipy") is not None:
        with _absent("scipy"):
            importlib.import_module(UNUSED)
        asked.is_scipy_available.cache_clear()  # it was asked inside


def _itself(path: object, file: str = "") -> ModuleType:
    """The package, for a module of it that would run it once more to have all of its names."""
    return sys.modules["transformers"]


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
