"""Which hooks a run has, out of its args: the standard ones, those switched on, and those that hooks.extra names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from trainer import registry
from trainer.args import HooksArgs, HookUse, Section, SwitchedArgs
from trainer.hooks import HOOKS, Context, Hook

STANDARD = ("qk_gradients", "metrics", "checkpoints", "samples", "progress")


@dataclass(frozen=True)
class Chosen:
    """A hook before it is made. Names are unique in a run."""

    name: str
    kind: type[Hook]
    options: Section | None


def chosen(args: HooksArgs, *, code: bool = True) -> tuple[Chosen, ...]:
    """Every hook of a run, in the order of its args; extra ones last. A standard one that is named again counts once.

    Raises:
        PartError: a name, or an option of one, is not known, or one is given twice; or it is no hook.
    """
    names = [*STANDARD, *(["tensorboard"] if args.tensorboard else [])]
    found = {name: Chosen(name, _kind(name), None) for name in names}
    for name, section in args:  # in the order of their fields
        if isinstance(section, SwitchedArgs) and section.on:
            found[name] = Chosen(name, _kind(name), section)
    for given in args.extra:
        use = HookUse(use=given) if isinstance(given, str) else given
        name = re.sub(r"\W+", "_", use.use.rpartition(":")[2])
        if use.use in names and not use.options:
            continue
        kind = _kind(use.use, code=code)
        options = options_of(use.use, kind, use.options)
        if name in found:
            raise registry.PartError(f"hooks.extra {use.use!r}: there is a hook {name!r} in this run already")
        found[name] = Chosen(name, kind, options)
    return tuple(found.values())


def made(hooks: Sequence[Chosen], context: Context, *, first: bool) -> list[Hook]:
    """The hooks, constructed; on a process that is not the first, those that act everywhere."""
    return [_made(hook, replace(context, name=hook.name)) for hook in hooks if first or hook.kind.everywhere]


def options_of(spec: str, kind: type[Hook], given: Mapping[str, Any]) -> Section | None:
    """The hook's own options, typed; None when it declares none.

    Raises:
        PartError: naming each mistake, with the option that was probably meant.
    """
    if kind.Options is None:
        if given:
            raise registry.PartError(f"hooks.extra {spec!r} takes no options, and was given {', '.join(given)}")
        return None
    try:
        options = kind.Options.model_validate(given)
        if isinstance(options, SwitchedArgs) and not options.on:
            needed = " or ".join(options.switches)
            raise registry.PartError(f"hooks.extra {spec!r} does nothing unless its option {needed} is set")
        return options
    except ValidationError as error:
        allowed = kind.Options.model_fields
        said = "; ".join(_sentence(e, allowed) for e in error.errors(include_url=False))
        raise registry.PartError(f"hooks.extra {spec!r}: {said}") from error


def _sentence(error: Any, allowed: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        meant = registry.nearest(name, allowed)
        hint = f"did you mean {meant}? " if meant else ""
        return f"{name} is not an option; {hint}(allowed: {', '.join(allowed) or 'none'})"
    if error["type"] == "missing":
        return f"{name} is required"
    said = str(error["msg"])
    return f"{name}: {said[0].lower()}{said[1:]} (given: {error['input']!r})" if name else said


def _kind(spec: str, *, code: bool = True) -> type[Hook]:
    kind: Any = registry.load(HOOKS, spec, "hooks.extra", code=code)
    if not (isinstance(kind, type) and issubclass(kind, Hook)):
        raise registry.PartError(f"hooks.extra {spec!r} is no subclass of trainer.hooks.Hook")
    return kind


def _made(hook: Chosen, context: Context) -> Hook:
    make: Any = hook.kind  # which of the two forms it has is said by its Options
    return make(context) if hook.options is None else make(context, hook.options)
