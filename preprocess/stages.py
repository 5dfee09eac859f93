"""The chain from decoded pictures to a dataset: its stages in their order, and those that people put between them.

A stage takes a `Report` and gives another: it may leave pictures out, change what is said of them, or put others in
their place. What it makes it keeps in the cache, so that the next time it makes only what is missing.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preprocess import buckets, captions, dedupe, masks, regular, rewrite, trigger, upscale
from preprocess.crew import Crew
from preprocess.ingest import FEWEST
from preprocess.types import Limits, PreprocessError, Report
from trainer import registry
from trainer.args import DataArgs

STAGES: dict[str, str] = {
    "dedupe": "preprocess.stages:Dedupe",
    "regular": "preprocess.stages:Regular",
    "caption": "preprocess.stages:Caption",
    "trigger": "preprocess.stages:Trigger",
    "mask": "preprocess.stages:Mask",
    "upscale": "preprocess.stages:Upscale",
    "bucket": "preprocess.stages:Bucket",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What a stage works with."""

    root: Path  # the run directory, which the items' files are relative to
    data: DataArgs
    allowed: Sequence[Sequence[buckets.Size]]  # the buckets of each resolution, smallest resolution first
    limits: Limits
    crew: Crew  # the processes that look at pictures


class Stage(ABC):
    """Base of every stage."""

    version = 1  # raise it when the same pictures would come out otherwise
    model = False  # True: the first of several processes does it alone, and the others find in the cache what it made

    @abstractmethod
    def __call__(self, report: Report, setting: Setting) -> Report:
        """What came of the source after this stage.

        Raises:
            PreprocessError: it cannot be trained on.
        """


class Dedupe(Stage):
    version = dedupe.VERSION

    def __call__(self, report: Report, setting: Setting) -> Report:
        data = setting.data
        if data.dedupe == "off":
            return report
        bits = data.dedupe_bits if data.dedupe == "near" else None
        left, copies = dedupe.deduped(report.items, setting.root, bits=bits, crew=setting.crew)
        if len(left) < FEWEST:
            raise PreprocessError(
                f"all pictures are copies of {left[0].source}, and at least {FEWEST} different ones are needed "
                f"({copies[0].file}: {copies[0].reason}); add others, or set data.dedupe to off"
            )
        return replace(report, items=tuple(left), skipped=(*report.skipped, *copies))


class Regular(Stage):
    def __call__(self, report: Report, setting: Setting) -> Report:
        found, skipped, notes = regular.regular(setting.data, report.items, setting.root, setting.limits, setting.crew)
        return replace(
            report,
            items=(*report.items, *found),
            skipped=(*report.skipped, *skipped),
            notes=(*report.notes, *notes),
        )


class Caption(Stage):
    version = captions.VERSION
    model = True

    def __call__(self, report: Report, setting: Setting) -> Report:
        own, ordinary = _parted(report)
        own = trigger.assigned(own, setting.data)
        told = captions.captioned([*own, *ordinary], setting.root, setting.data)
        triggers = sorted({item.trigger for item in own})
        regular.check_captions([item for item in told if item.regular], setting.data, triggers)
        return replace(report, items=tuple(told))


class Trigger(Stage):
    version = trigger.VERSION
    model = True

    def __call__(self, report: Report, setting: Setting) -> Report:
        own, ordinary = _parted(report)
        without = [item.source for item in own if not trigger.named(item.caption, item.trigger)]
        found, notes = {}, []
        if setting.data.rewrite == "model":
            found, notes = rewrite.rewritten(own, setting.root, setting.data)
        named = trigger.triggered(own, setting.data, found)
        return replace(report, items=(*named, *ordinary), notes=(*report.notes, *notes), untriggered=tuple(without))


class Mask(Stage):
    version = masks.VERSION

    def __call__(self, report: Report, setting: Setting) -> Report:
        if not setting.data.masks:
            return report
        own, ordinary = _parted(report)
        masked, notes = masks.masked(own, setting.root, setting.data.mask, setting.crew)
        return replace(report, items=(*masked, *ordinary), notes=(*report.notes, *notes))


class Upscale(Stage):
    version = upscale.VERSION
    model = True

    def __call__(self, report: Report, setting: Setting) -> Report:
        items, notes = upscale.upscaled(report.items, setting.root, setting.data, setting.allowed)
        return replace(report, items=tuple(items), notes=(*report.notes, *notes))


class Bucket(Stage):
    version = buckets.VERSION

    def __call__(self, report: Report, setting: Setting) -> Report:
        items = tuple(buckets.bucketed(item, *setting.allowed) for item in report.items)
        if setting.data.crop == "mask":
            items = buckets.focused(items, setting.root, setting.crew)
        notes = [note for item in items for note in buckets.remarks(item, setting.data.upscale_limit)]
        return replace(report, items=items, notes=(*report.notes, *notes))


def _parted(report: Report) -> tuple[list[Any], list[Any]]:
    """(the concepts' pictures, those of the regularisation set)."""
    return [item for item in report.items if not item.regular], [item for item in report.items if item.regular]


@dataclass(frozen=True)
class Link:
    """One stage of a chain."""

    name: str  # as dataset.jsonl names it: of the table, or what data.stages said
    stage: Stage

    def __call__(self, report: Report, setting: Setting) -> Report:
        """Runs it; with several processes, one after the other where it has a model."""
        share = setting.crew.share
        with share.first_alone() if self.stage.model else nullcontext():
            after = self.stage(report, setting)
        return self._checked(after)

    def _checked(self, report: Any) -> Report:
        if not isinstance(report, Report):
            raise PreprocessError(f"data.stages {self.name!r} gave a {type(report).__name__}, and must give a Report")
        own = [item for item in report.items if not item.regular]
        if len(own) < FEWEST:
            raise PreprocessError(f"the stage {self.name} left {len(own)} pictures, and at least {FEWEST} are needed")
        return report


def chain(own: Mapping[str, str], *, code: bool = True) -> list[Link]:
    """The stages in their order.

    Args:
        own: data.stages: `NAME`, `before NAME` or `after NAME` -> module:attr or file.py:attr of a `Stage`.
        code: False refuses every stage that is not of the table.

    Raises:
        PartError: a place or a stage is unknown, or is no stage.
    """
    for place in own:
        _known(place)
    made: list[Link] = []
    for name in STAGES:
        made += _links(own, f"before {name}", code=code)
        made += _links(own, name, code=code) or [Link(name, _made(STAGES[name], name, code=True))]
        made += _links(own, f"after {name}", code=code)
    return made


def _known(place: str) -> None:
    order, _, name = place.rpartition(" ")
    if name in STAGES and order in ("", "before", "after"):
        return
    meant = registry.nearest(name, STAGES)
    hint = f"; did you mean {' '.join(filter(None, (order, meant)))}?" if meant and meant != name else ""
    raise registry.PartError(
        f"data.stages names the place {place!r}{hint} (allowed: one of {', '.join(STAGES)}, alone, or with before or "
        "after in front of it)"
    )


def _links(own: Mapping[str, str], place: str, *, code: bool) -> list[Link]:
    return [Link(own[place], _made(own[place], place, code=code))] if place in own else []


def _made(spec: str, place: str, *, code: bool) -> Stage:
    kind: Any = registry.load(STAGES, spec, f"data.stages {place!r}", code=code)
    if not (isinstance(kind, type) and issubclass(kind, Stage)):
        raise registry.PartError(f"data.stages {place!r}: {spec!r} is no subclass of preprocess.stages.Stage")
    return kind()
