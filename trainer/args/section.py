"""What every section of the tree is made of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

Probability = float


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class SwitchedArgs(Section):
    """A hook's options, of which some turn it on by being other than their default; without, the rest do nothing."""

    switches: ClassVar[tuple[str, ...]]

    @property
    def on(self) -> bool:
        return any(name in self._given() for name in self.switches)

    @model_validator(mode="after")
    def _used(self) -> Self:
        idle = [name for name in self._given() if name not in self.switches]
        if idle and not self.on:
            raise ValueError(f"{', '.join(idle)} does nothing unless {' or '.join(self.switches)} is set")
        return self

    def _given(self) -> list[str]:
        """The options that are not what they are by default."""
        fields = type(self).model_fields
        return [name for name, value in self if value != fields[name].default]


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def only_with(section: Section, switch: str, users: Mapping[str, tuple[str, ...]]) -> None:
    """ValueError where an option differs from its default and the section's `switch` has no value that uses it."""
    value = getattr(section, switch)
    for option, by in users.items():
        if getattr(section, option) != type(section).model_fields[option].default and value not in by:
            raise ValueError(f"{option} is given, but {switch} is {value}, which ignores it; take {' or '.join(by)}")


def check_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
