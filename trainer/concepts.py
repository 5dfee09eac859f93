"""What follows from which concept each picture shows: class words, prompts, an order in which all take turns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import cycle, islice, product, zip_longest
from typing import Protocol, TypeVar

from trainer.args import ConceptArgs, DataArgs
from trainer.registry import nearest

_PROMPTS = 4  # that are made of captions, where nobody gave any
_FOLDER = re.compile(r"\{trigger:([^{}]*)\}")


class ConceptError(ValueError):
    """An option that does not fit the concepts there are. One sentence."""


class Picture(Protocol):
    """What depends on the concept, of a picture."""

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def captions(self) -> tuple[str, ...]: ...
    @property
    def trigger(self) -> str:
        """Empty where the manifest does not say, and for a regular one."""
        ...

    @property
    def regular(self) -> bool:
        """True for one of the regularisation set, which shows no concept."""
        ...


P = TypeVar("P", bound=Picture)


def trigger_of(picture: Picture, data: DataArgs) -> str:
    """The trigger of the picture's concept; empty for a regular one."""
    return "" if picture.regular else picture.trigger or data.of(picture.folder).trigger


def filled(data: DataArgs, pictures: Sequence[Picture]) -> DataArgs:
    """The section with a concept for every folder, once there are several; with none it stays as it is."""
    if not data.concepts:
        return data
    folders = dict.fromkeys(picture.folder for picture in pictures if not picture.regular)
    others = {
        folder: ConceptArgs.model_validate({"trigger": data.trigger})
        for folder in folders
        if folder not in data.concepts
    }
    return data.model_copy(update={"concepts": {**data.concepts, **others}})


def in_turn(pictures: Sequence[P]) -> list[P]:
    """The pictures of concepts, those of each trigger taking turns; with one trigger in their own order."""
    by_trigger: dict[str, list[P]] = {}
    for picture in pictures:
        if not picture.regular:
            by_trigger.setdefault(picture.trigger, []).append(picture)
    rows = zip_longest(*by_trigger.values())
    return [picture for row in rows for picture in row if picture is not None]


def prompts(
    given: Sequence[str], data: DataArgs, pictures: Sequence[Picture], row: int | None = None
) -> tuple[str, ...]:
    """Prompts with the triggers written out: those given, else the first captions, at least one for each trigger.

    Args:
        given: {trigger} stands for the first concept's, {trigger:FOLDER} for that of a folder.
        row: so many of them, in turn.

    Raises:
        ConceptError: a prompt names a folder that there is not.
    """
    if given:
        found = tuple(_written(prompt, data) for prompt in given)
    else:
        count = row or max(_PROMPTS, len({picture.trigger for picture in pictures if not picture.regular}))
        found = tuple(dict.fromkeys(picture.caption for picture in in_turn(pictures)))[:count]
    return tuple(islice(cycle(found), row)) if row else found


def _written(prompt: str, data: DataArgs) -> str:
    def trigger(found: re.Match[str]) -> str:
        folder = found[1]
        if folder not in data.concepts:
            meant = nearest(folder, data.concepts)
            hint = f"; did you mean {meant}?" if meant else ""
            known = ", ".join(data.concepts) or "none"
            raise ConceptError(
                f"sample.prompts has {found[0]} in {prompt!r}, and data.concepts has no folder {folder!r}{hint} "
                f"(folders: {known})"
            )
        return data.concepts[folder].trigger

    return _FOLDER.sub(trigger, prompt.replace("{trigger}", data.triggers[0]))


def priors(data: DataArgs, pictures: Sequence[Picture]) -> dict[str, list[str]]:
    """Picture name -> every caption of it with every class word in its trigger's place.

    Another concept's trigger in the caption becomes the first of that one's class words. A picture without a trigger
    keeps its captions.

    Raises:
        ConceptError: a picture's concept has no class word.
    """
    folders = sorted({picture.folder for picture in pictures if not picture.regular})
    classes = {data.of(folder).trigger: data.of(folder).class_words for folder in [*folders, *data.concepts]}
    bare = [picture.name for picture in pictures if not picture.regular and not data.of(picture.folder).class_words]
    if bare:
        raise ConceptError(
            f"objective.prior_weight needs class words, and there are none for {len(bare)} pictures ({bare[0]}); "
            "give data.class_words, or class_words of their concept in data.concepts"
        )
    others = {trigger: words[0] for trigger, words in classes.items() if words}
    return {picture.name: _spared(picture, data, others) for picture in pictures}


def ordinary(prompt: str, data: DataArgs) -> str:
    """The prompt with each trigger's first class word in its place, or without it where it has none."""
    of_folders = [data.of(folder) for folder in data.concepts] or [data]
    words = {concept.trigger: (concept.class_words or ("",))[0] for concept in of_folders}
    return " ".join(_replaced(prompt, words).split())


def _spared(picture: Picture, data: DataArgs, others: Mapping[str, str]) -> list[str]:
    captions = picture.captions or (picture.caption,)
    if picture.regular:
        return list(captions)
    own, words = trigger_of(picture, data), data.of(picture.folder).class_words
    return [_replaced(caption, {**others, own: word}) for caption, word in product(captions, words)]


def _replaced(caption: str, words: Mapping[str, str]) -> str:
    """The caption with each key of `words`, where it stands as a word, replaced; of several the longest counts."""
    longest_first = "|".join(re.escape(trigger) for trigger in sorted(words, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{longest_first})(?!\w)", lambda found: words[found[0]], caption)
