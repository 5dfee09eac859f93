"""What a person should know of a dataset before training on it: what it holds, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from preprocess import buckets
from preprocess.types import Item, Report

_NAMED = 5  # pictures that a line names before it says how many more there are


@dataclass(frozen=True)
class Survey:
    """`facts` are as they should be, each of `problems` may spoil the result; all are sentences."""

    pictures: int  # of the concepts
    facts: tuple[str, ...]
    problems: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        return asdict(self)


def survey(report: Report) -> Survey:
    """The survey of what preprocessing made."""
    items = report.items
    own = [item for item in items if not item.regular]
    triggers = Counter(item.trigger for item in own)
    bare = set(report.untriggered)
    enlarged = {item.source: buckets.enlarged(item, item.bucket) for item in items}
    grown = [source for source, times in enlarged.items() if times > 1]
    masked = sum(item.mask is not None for item in items)
    facts = [f"{len(own)} pictures, {len(report.skipped)} left out"]
    if len(own) < len(items):
        facts.append(f"{len(items) - len(own)} regularisation pictures")
    facts += [f"bucket {w} x {h}: {count}" for (w, h), count in sorted(Counter(i.bucket for i in items).items())]
    if grown:
        facts.append(f"{len(grown)} enlarged, at most {max(enlarged.values()):.2g} times: {_some(grown)}")
    if masked:
        facts.append(f"{masked} masked")
    if len(triggers) > 1:
        facts += [f"{count} pictures of {trigger}: {_folders(own, trigger)}" for trigger, count in triggers.items()]
    for trigger in triggers:
        without = [item.source for item in own if item.trigger == trigger and item.source in bare]
        if without:
            facts.append(f"{len(without)} captions came without {trigger}: {_some(without)}")
    problems = [f"{skip.file} is left out: {skip.reason}" for skip in report.skipped]
    problems += report.notes
    return Survey(len(own), tuple(facts), tuple(problems))


def _folders(items: Sequence[Item], trigger: str) -> str:
    return "folders " + _some(sorted({item.folder for item in items if item.trigger == trigger}))


def _some(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
