"""Cog's flat inputs: which there are, what they stand for in the tree, and the literal lines that Cog reads of them.

    python -m trainer.cog_inputs --write     puts the lines between the marks of train.py and predict.py
    python -m trainer.cog_inputs --check     exit status 1 where they are others

Cog parses the file without running it and drops what is not literal; so the lines are made, and never typed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Le, Lt, MaxLen, MinLen
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from trainer import cli
from trainer.args.requests import Choices, DrawingRequest, TrainingRequest

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120  # of a line, as the formatter has it


@dataclass(frozen=True)
class Flat:
    """An input that stands for an option of the tree; `names` are equal, the first is the one to use."""

    option: str
    names: tuple[str, ...]
    of: str = ""  # what the option is of, where its section says so and its description does not
    kind: str | None = None  # Cog's type, where the option's own has none

    @property
    def blank(self) -> str:
        """What the option is without: the preset's value is nobody else's default."""
        return "the preset's" if self.option in _of_presets() else _default(self.option)


TRAINING = (
    Flat("data.trigger", ("trigger_word", "token_string")),
    Flat("data.captioner", ("captioner",)),
    Flat("data.prefix", ("autocaption_prefix", "caption_prefix")),
    Flat("data.suffix", ("autocaption_suffix",)),
    Flat("runtime.steps", ("steps", "max_train_steps")),
    Flat("optim.adapter.lr", ("learning_rate", "lora_lr"), " of the adapter"),
    Flat("optim.rows.lr", ("ti_lr",), " of the trigger's vectors"),
    Flat("optim.adapter.name", ("optimizer",)),
    Flat("runtime.batch_size", ("batch_size", "train_batch_size")),
    Flat("data.resolution", ("resolution",), kind="int | str"),
    Flat("adapter.rank", ("lora_rank",)),
    Flat("model.base", ("base_model",)),
    Flat("model.gradient_checkpointing", ("gradient_checkpointing",)),
    Flat("data.caption_dropout", ("caption_dropout_rate",)),
    Flat("runtime.seed", ("seed",)),
    Flat("runtime.checkpoint_every", ("checkpointing_steps",)),
    Flat("sample.pictures", ("n_sample_imgs",)),
)


class InputError(ValueError):
    """Inputs that contradict one another. One sentence."""


def chosen(given: Mapping[str, Any], flats: Iterable[Flat] = TRAINING) -> dict[str, Any]:
    """Option -> value of the flat inputs that were given, not of those left blank (None).

    Raises:
        InputError: two names of one option have different values.
    """
    found: dict[str, Any] = {}
    for flat in flats:
        values = {name: given[name] for name in flat.names if given.get(name) is not None}
        if len({str(value) for value in values.values()}) > 1:
            said = " and ".join(f"{name} is {value!r}" for name, value in values.items())
            raise InputError(f"{said}, and they are two names for one thing; give one of them")
        if values:
            found[flat.option] = next(iter(values.values()))
    return found


def tree(options: Mapping[str, Any]) -> cli.Tree:
    """Dotted options as the sections that they are in."""
    layers: list[cli.Tree] = []
    for option, value in options.items():
        *sections, leaf = option.split(".")
        layer: cli.Tree = {leaf: value}
        for section in reversed(sections):
            layer = {section: layer}
        layers.append(layer)
    return cli.merge(layers)


# --- the lines


def training_lines() -> list[str]:
    """The parameters of train.py's `train`."""
    own = TrainingRequest.model_fields
    lines = _request(own, "input_images")
    lines += _flat(TRAINING[:1]) + _request(own, "concept_mode", "autocaption") + _flat(TRAINING[1:4])
    lines += _request(own, "mask_target_prompts") + _flat(TRAINING[4:])
    return lines + _request(own, "resume_from", "hf_repo_id", "hf_token", "args")


def drawing_lines() -> list[str]:
    """The parameters of predict.py's `Runner.run`."""
    return _request(DrawingRequest.model_fields, *DrawingRequest.model_fields, width=WIDTH - 4)


def names(flats: Iterable[Flat] = TRAINING) -> list[str]:
    """Every flat input that stands for an option."""
    return [name for flat in flats for name in flat.names]


def _flat(flats: Iterable[Flat]) -> list[str]:
    lines: list[str] = []
    for flat in flats:
        field = cli.options()[flat.option]
        described = f"{_plain(field.description)}{flat.of}; blank: {flat.blank}"
        kind = flat.kind or _kind(field.annotation)
        for name in flat.names:
            said = described if name == flat.names[0] else f"the same as {flat.names[0]}"
            bounds = {} if flat.kind else _bounds(field)
            lines.append(_line(name, f"{kind} | None", {"default": None, **bounds, "description": said}))
    return lines


def _request(fields: Mapping[str, FieldInfo], *wanted: str, width: int = WIDTH) -> list[str]:
    lines: list[str] = []
    for name in wanted:
        field = fields[name]
        optional = NoneType in get_args(field.annotation)
        kind = _kind(field.annotation) + (" | None" if optional else "")
        given = {} if field.is_required() else {"default": field.default}
        options = {**given, **_bounds(field), "description": _plain(field.description)}
        lines.append(_line(name, kind, options, width))
    return lines


def _line(name: str, kind: str, options: Mapping[str, Any], width: int = WIDTH) -> str:
    """One parameter, wrapped as the formatter does to lines of `width`."""
    words = [f"{option}={_literal(value)}" for option, value in options.items()]
    head = f"    {name}: {kind} = Input("
    if len(one := f"{head}{', '.join(words)}),") <= width:
        return one
    if len(inner := " " * 8 + ", ".join(words)) <= width:
        return f"{head}\n{inner}\n    ),"
    rows = [head]
    for word, (option, value) in zip(words, options.items(), strict=True):
        if isinstance(value, list) and len(word) + 9 > width:
            rows += [f"        {option}=[", *(f"            {_literal(one)}," for one in value), "        ],"]
        else:
            rows.append(f"        {word},")
    return "\n".join([*rows, "    ),"])


def _literal(value: Any) -> str:
    """As the formatter would leave it: Cog takes a string as it is written, so it can hold no backslash."""
    if isinstance(value, str):
        quote = "'" if '"' in value else '"'
        if "\\" in value or "\n" in value or (quote == "'" and "'" in value):
            raise ValueError(f"Cog cannot read this text as it is meant: {value}")
        return f"{quote}{value}{quote}"
    if isinstance(value, list):
        return f"[{', '.join(_literal(one) for one in value)}]"
    return repr(value)


def _kind(annotation: Any) -> str:
    """Cog's name of a type; None beside it is left out."""
    inner = [one for one in get_args(annotation) if one is not NoneType]
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_kind(one) for one in inner)
    if get_origin(annotation) is list:
        return f"list[{_kind(inner[0])}]"
    if get_origin(annotation) is Literal:
        return _kind(type(inner[0]))
    known = {str: "str", int: "int", float: "float", bool: "bool", Path: "Path", SecretStr: "Secret"}
    if annotation not in known:
        raise ValueError(f"Cog has no input of the type {annotation}")
    return known[annotation]


def _bounds(field: FieldInfo) -> dict[str, Any]:
    """Those that Cog knows; the tree checks the others."""
    found: dict[str, Any] = {}
    for one in field.metadata:
        if isinstance(one, Ge):
            found["ge"] = one.ge
        elif isinstance(one, Le):
            found["le"] = one.le
        elif isinstance(one, Lt) and isinstance(one.lt, int):
            found["le"] = one.lt - 1
        elif isinstance(one, MinLen):
            found["min_length"] = one.min_length
        elif isinstance(one, MaxLen):
            found["max_length"] = one.max_length
        elif (pattern := getattr(one, "pattern", None)) and "\\" not in pattern:
            found["regex"] = pattern
    choices = _choices(field.annotation) or [
        v for one in field.metadata if isinstance(one, Choices) for v in one.values
    ]
    return {**found, **({"choices": choices} if choices else {})}


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return next((list(get_args(one)) for one in get_args(annotation) if get_origin(one) is Literal), [])


def _plain(description: str | None) -> str:
    """Without what is about the command line: its default, and code of the caller's."""
    assert description, "every option has a description"
    return re.sub(r",(?: or)? module:attr(?: or file\.py:attr)?", "", description.partition(" [default:")[0])


def _default(option: str) -> str:
    field = cli.options()[option]
    said = (field.description or "").partition("[default: ")[2].rstrip("]")
    if said:
        return said
    value = cli.default_of(option)
    return "nothing" if value == "" else "no" if value is False else str(value)


def _of_presets() -> set[str]:
    """Options that a preset sets."""
    modes: Sequence[str] = _choices(TrainingRequest.model_fields["concept_mode"].annotation)
    return {name for mode in modes for name in leaves(cli.preset(mode))}


def leaves(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted options of a tree and their values."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in cli.options():
            found |= leaves(value, f"{name}.")
        else:
            found[name] = value
    return found


# --- the files

BEGIN, END = "    # <inputs> made by python -m trainer.cog_inputs --write", "    # </inputs>"


def rendered(text: str, lines: Sequence[str], indent: int = 0) -> str:
    """`text` with `lines` between its marks."""
    pad = " " * indent
    before, found, rest = text.partition(f"{pad}{BEGIN}\n")
    _, end, after = rest.partition(f"{pad}{END}\n")
    if not found or not end:
        raise ValueError("the marks of the inputs are gone")
    body = "".join(f"{pad}{line}\n" if line else "\n" for block in lines for line in block.split("\n"))
    return f"{before}{found}{body}{end}{after}"


def files() -> dict[Path, str]:
    """Each file as it should be."""
    train, predict = ROOT / "train.py", ROOT / "predict.py"
    return {
        train: rendered(train.read_text(encoding="utf-8"), training_lines()),
        predict: rendered(predict.read_text(encoding="utf-8"), drawing_lines(), indent=4),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.cog_inputs", description="Cog's inputs, from the args.")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--write", action="store_true", help="write them into train.py and predict.py")
    how.add_argument("--check", action="store_true", help="only compare; exit status 1 where they differ")
    options = parser.parse_args(argv)
    stale = {path: text for path, text in files().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if options.write:
            path.write_text(text, encoding="utf-8")
        else:
            sys.stderr.write(f"{path.name} is stale: python -m trainer.cog_inputs --write\n")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
