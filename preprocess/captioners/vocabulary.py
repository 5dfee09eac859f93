"""The phrases that the clip captioner picks from.

A vocabulary is a JSON file:

    {"compare": "a {colour} {shape} on a {background} background",
     "write": "a {colour} shape on a {background} background",
     "slots": {"colour": ["red", "green"], "background": ["white", "black"], "shape": ["cat", "dog"]}}

`compare` is what the picture is held against, `write` the caption (as `compare` when it is left out). An empty phrase
is allowed, and a becomes an before a vowel.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from preprocess.types import PreprocessError

_PAIRS = 20_000  # of the first two slots


class Vocabulary(BaseModel):
    """What a vocabulary file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compare: str
    write: str | None = None
    slots: dict[str, tuple[str, ...]]


def read_vocabulary(path: Path) -> Vocabulary:
    """Raises PreprocessError for a file that is no vocabulary."""
    try:
        vocabulary = Vocabulary.model_validate(json.loads(path.read_text(encoding="utf-8")))
        return _checked(vocabulary)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PreprocessError(f"data.caption_model.vocabulary {str(path)!r} cannot be read as JSON: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PreprocessError(
            f"data.caption_model.vocabulary {str(path)!r} is no vocabulary: {where}: {first['msg']}"
        ) from error
    except ValueError as error:
        raise PreprocessError(f"data.caption_model.vocabulary {str(path)!r} is no vocabulary: {error}") from error


def _checked(vocabulary: Vocabulary) -> Vocabulary:
    slots = vocabulary.slots
    if not slots or not all(slots.values()):
        raise ValueError("it needs at least one slot, and a phrase in each")
    compared = _fields(vocabulary.compare)
    if compared != set(slots):
        raise ValueError(f"compare names the slots {_listed(compared)}, and slots holds {_listed(slots)}")
    if unknown := _fields(vocabulary.write or "") - set(slots):
        raise ValueError(f"write names {_listed(unknown)}, and slots holds {_listed(slots)}")
    first = list(slots.values())[:2]
    pairs = len(first[0]) * (len(first[1]) if len(first) > 1 else 1)
    if pairs > _PAIRS:
        raise ValueError(f"its first two slots make {pairs} pairs, and {_PAIRS} are allowed; put shorter slots first")
    return vocabulary


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
