"""The command line of training: argv -> `Command`, with every option generated from the args tree.

Weakest first: defaults, --preset, the JSON file, flags. The environment is never read.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from trainer.args import TrainArgs
from trainer.registry import nearest

PRESETS = Path(__file__).resolve().parent.parent / "presets"

Tree = dict[str, Any]


class CommandError(ValueError):
    """What was typed or written cannot be used. One line a mistake, for the person at the door."""


@dataclass(frozen=True)
class Command:
    """What the command line asks for. `args` is None only for a plain `--resume RUN`."""

    args: TrainArgs | None
    resume: Path | None = None
    print_args: bool = False
    dry_run: bool = False


def parse(argv: Sequence[str]) -> Command:
    """The command in `argv` (without the program's name).

    Raises:
        CommandError: an unknown option, a bad value, or a file that holds no args.
        SystemExit: after --help.
    """
    doors, flags = _split(argv)
    layers = [preset(doors.preset)] if doors.preset else []
    if doors.file:
        layers.append(_file(doors.file))
    if doors.pictures:
        layers.append({"data": {"source": doors.pictures}})
    layers.append(flags)
    if doors.resume is not None:
        if doors.dry_run:
            raise CommandError("--dry-run tells of a new run, and --resume continues one; leave one of them out")
        return Command(_resumed(doors.resume, layers), doors.resume, doors.print_args)
    if not any(layers):
        raise CommandError("nothing to do: give a preset or args file and a folder of pictures (--help shows all)")
    return Command(validate(merge(layers)), None, doors.print_args, doors.dry_run)


def validate(tree: Mapping[str, Any]) -> TrainArgs:
    """The typed tree. Raises CommandError naming every mistake, with the option that was probably meant."""
    try:
        return TrainArgs.model_validate(tree)
    except ValidationError as error:
        raise CommandError("\n".join(_sentence(e) for e in error.errors(include_url=False))) from error


def merge(layers: Sequence[Mapping[str, Any]]) -> Tree:
    """One tree out of several, later ones stronger. Lists are replaced, sections are joined."""
    merged: Tree = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            merged[key] = merge([old, value]) if both else value  # pyright: ignore[reportArgumentType]
    return merged


@functools.cache
def options() -> dict[str, FieldInfo]:
    """Every option by its dotted name, in the order of the tree."""
    return dict(_leaves(TrainArgs))


def default_of(name: str) -> Any:
    """The value that the option has when nobody sets it."""
    value: Any = _unset()
    for part in name.split("."):
        value = getattr(value, part)
    return value


@functools.cache
def _unset() -> TrainArgs:
    return TrainArgs.model_validate({"data": {"source": "x"}})


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _sentence(error: ErrorDetails) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown(name)
    if error["type"] == "missing":
        first = next((option for option in options() if f"{option}.".startswith(f"{name}.")), None)  # "data": its first
        return f"{first} is required: {options()[first].description}" if first else f"{name} is required"
    if error["type"] == "value_error":
        said = str(error.get("ctx", {}).get("error", error["msg"]))
        return f"{name}: {said}" if name else said
    return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]} (given: {error['input']!r})"


def _unknown(name: str) -> str:
    """`adapter.rnak is not an option; did you mean adapter.rank?`"""
    every = options()
    leaf = name.rsplit(".", 1)[-1]
    same_leaf = [option for option in every if option.rsplit(".", 1)[-1] == leaf]
    meant = same_leaf[0] if same_leaf else nearest(name, every)
    if meant is None:  # a bare or misplaced word: compare it with the last words alone
        leaves = {option.rsplit(".", 1)[-1]: option for option in reversed(every)}
        close = nearest(leaf, leaves)
        meant = leaves[close] if close else None
    return f"{name} is not an option; " + (f"did you mean {meant}?" if meant else "--help lists them all")


def preset(name: str) -> Tree:
    """The tree of a shipped preset."""
    known = sorted(path.stem for path in PRESETS.glob("*.json"))
    if name not in known:
        meant = nearest(name, known)
        hint = f"; did you mean {meant}?" if meant else ""
        raise CommandError(f"there is no preset {name!r}{hint} (presets: {', '.join(known)})")
    return _file(str(PRESETS / f"{name}.json"))


def _file(name: str) -> Tree:
    path = Path(name)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise CommandError(f"there is no args file {name!r}")
        return preset(name)
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CommandError(f"{name} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise CommandError(f"{name} cannot be read as an args file: {error}") from error
    if not isinstance(tree, dict):
        raise CommandError(f"{name} must hold a JSON object of sections, as presets/object.json does")
    return tree


def _resumed(run: Path, layers: Sequence[Mapping[str, Any]]) -> TrainArgs | None:
    """The run's own args with what was typed on top, or None when nothing was typed."""
    saved = run / "args.json"
    if not any(layers) or not saved.is_file():  # a folder that is no run is refused where it is opened
        return None
    return validate(merge([_file(str(saved)), *layers]))


# --- flags: pydantic-settings makes them from the tree, the parser below words the help and the errors


class _Flags(BaseSettings, TrainArgs):  # pyright: ignore[reportIncompatibleVariableOverride]
    model_config = SettingsConfigDict(extra="forbid", frozen=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def _split(argv: Sequence[str]) -> tuple[argparse.Namespace, Tree]:
    """(what is not an option of the tree, the tree of the flags that were typed)."""
    parser = _Parser(
        prog="train.py",
        usage="train.py [PRESET_OR_ARGS.json] [PICTURES] [--section.option value ...]",
        description="Teaches an image diffusion model a new subject, face or style.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=160),
    )
    parser.add_argument("file", nargs="?", metavar="PRESET_OR_ARGS.json", help="a preset's name, or a file of args")
    parser.add_argument("pictures", nargs="?", metavar="PICTURES", help="folder or .zip; the same as --data.source")
    parser.add_argument("--preset", metavar="NAME", help="args beneath those of the file [default: none]")
    parser.add_argument("--resume", metavar="RUN", type=Path, help="continue the run in this directory [default: none]")
    parser.add_argument("--print-args", action="store_true", help="show the args as JSON and stop [default: off]")
    parser.add_argument("--dry-run", action="store_true", help="say what a run would do and stop [default: off]")
    doors: list[argparse.Namespace] = []

    def parse_args(root: argparse.ArgumentParser, args: Sequence[str] | None, _: object = None) -> argparse.Namespace:
        typed, rest = root.parse_known_intermixed_args(args)
        if rest:
            raise CommandError("\n".join(_leftover(word) for word in _mistakes(rest)))
        own = ("file", "pictures", "preset", "resume", "print_args", "dry_run")
        doors.append(argparse.Namespace(**{name: vars(typed).pop(name) for name in own}))
        return typed

    source: Any = CliSettingsSource(
        _Flags,
        root_parser=parser,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
        parse_args_method=parse_args,
        add_argument_method=_add_argument,
    )
    try:
        tree: Tree = source(args=list(argv))()
    except SettingsError as error:
        raise CommandError(_unreadable(str(error), argv)) from error
    return doors[0], tree


def _unreadable(said: str, argv: Sequence[str]) -> str:
    """A flag whose value could not be split into its parts, in words of ours."""
    name = next((name for name in options() if re.search(rf"\b{re.escape(name)}(?![\w.])", said)), None)
    if name is None:
        return said
    flags = [*argv, ""]
    values = [flags[i + 1] for i, word in enumerate(argv) if word == f"--{name}"]
    values += [word.partition("=")[2] for word in argv if word.startswith(f"--{name}=")]
    takes = (
        "takes name=value, with commas between several, or a JSON object"
        if _is_mapping(name)
        else "takes a JSON list, or A,B"
    )
    return f"--{name} {takes} (given: {', '.join(repr(value) for value in values)})"


def _is_mapping(name: str) -> bool:
    return get_origin(options()[name].annotation) is dict


def _mistakes(rest: Sequence[str]) -> list[str]:
    """The unknown flags among the words nobody took; their values are not mistakes of their own."""
    flags = [word for word in rest if word.startswith("--")]
    return flags or list(rest)


def _leftover(word: str) -> str:
    if not word.startswith("--"):
        return f"{word!r} is one word too many; --help shows what goes where"
    name = word[2:].split("=")[0]
    doors = {"preset", "resume", "print-args", "dry-run", "help"}
    meant = nearest(name, doors)
    if "." not in name and meant:
        return f"--{name} is not an option; did you mean --{meant}?"
    return _unknown(name.replace("-", "_"))


def _add_argument(group: Any, *names: str, **settings: Any) -> Any:
    """Adds one generated flag, with our own help line and with text lists that may hold commas."""
    option = names[-1].removeprefix("--no-").removeprefix("--")
    field = options().get(option)
    if field is not None:
        settings["help"] = f"{field.description}{_default_text(option, field)}".replace("%", "%%")
        if get_origin(field.annotation) is tuple:
            text = str in (kind := get_args(field.annotation)[0], *get_args(kind))
            settings |= {"metavar": "TEXT", "type": _one_text} if text else {"metavar": "A,B"}
        elif "metavar" in settings and not str(settings["metavar"]).startswith("{"):
            settings["metavar"] = str(settings["metavar"]).upper()
    return group.add_argument(*names, **settings)


def _default_text(option: str, field: FieldInfo) -> str:
    if field.is_required():
        return " (required)"
    if "[default:" in (field.description or ""):
        return ""
    value = default_of(option)
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, tuple):
        value = ",".join(str(item) for item in value) or "none"
    return f" [default: {'none' if value is None else value}]"


def _one_text(word: str) -> str:
    """A repeated flag gives one text each time, commas and all; a JSON list gives several, a JSON object one."""
    if word.lstrip().startswith("["):
        return word
    return f"[{word}]" if _is_object(word) else json.dumps([word])


def _is_object(word: str) -> bool:
    """{"use": ...} is one; {trigger} is a text."""
    try:
        return isinstance(json.loads(word), dict)
    except json.JSONDecodeError:
        return False
