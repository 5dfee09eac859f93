"""The trigger stage: every caption names the trigger, where the mode wants it, by rules that need no model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from preprocess.types import Item, PreprocessError
from trainer.args import DataArgs
from trainer.registry import nearest

VERSION = 1  # raise it when the same text would give another caption

# What captions call the person in a portrait, when data.class_words says nothing else.
PEOPLE = ("person", "woman", "man", "girl", "boy", "lady", "guy", "gentleman", "child", "kid", "toddler", "baby",
          "face", "portrait of someone", "someone")  # fmt: skip
_SHOWN = 10  # captions whose change is logged
_NAMED = 10  # folders, or pictures, that a message names

Rewrites = Mapping[tuple[str, str, str], str]  # caption, trigger, mode -> the caption that names the trigger
_NONE: Rewrites = MappingProxyType({})

_log = logging.getLogger(__name__)


def assigned(items: Sequence[Item], data: DataArgs) -> list[Item]:
    """The items, each with the trigger of its folder's concept.

    Raises:
        PreprocessError: a concept's folder has no pictures, or a picture outside the concepts has no class word.
    """
    there = sorted({item.folder for item in items})
    for folder in data.concepts:
        if folder not in there:
            meant = nearest(folder, there)
            hint = f"; did you mean {meant}?" if meant else ""
            raise PreprocessError(
                f"data.concepts names the folder {folder!r}, which has no pictures{hint} (folders: {_some(there)})"
            )
    outside = [item.source for item in items if item.folder not in data.concepts]
    if data.concepts and outside and data.mode == "object" and not data.class_words:
        raise PreprocessError(
            f"data.mode is object, but data.class_words names no word for {_some(outside)}; name their folders in "
            "data.concepts, or give data.class_words"
        )
    return [replace(item, trigger=data.of(item.folder).trigger) for item in items]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def triggered(items: Sequence[Item], data: DataArgs, rewrites: Rewrites = _NONE) -> list[Item]:
    """The items with the trigger, the prefix and the suffix in all of their captions; says what it changed.

    Args:
        rewrites: what `preprocess.rewrite` found; the rules are for the other captions.
    """
    after = [_item(item, data.of(item.folder), rewrites) for item in items]
    changed = [
        (item.source, old, new)
        for item, done in zip(items, after, strict=True)
        for old, new in zip(item.captions or (item.caption,), done.captions or (done.caption,), strict=True)
        if old != new
    ]
    for source, old, new in changed[:_SHOWN]:
        _log.info("%s: %r becomes %r", source, old, new)
    if len(changed) > _SHOWN:
        _log.info("and %d more captions in the same way", len(changed) - _SHOWN)
    return after


def _item(item: Item, data: DataArgs, rewrites: Rewrites) -> Item:
    captions = tuple(with_trigger(caption, data, rewrites) for caption in item.captions)
    first = captions[0] if captions else with_trigger(item.caption, data, rewrites)
    return replace(item, captions=captions, caption=first)


def with_trigger(caption: str, data: DataArgs, rewrites: Rewrites = _NONE) -> str:
    """The caption as it is trained. One that names the trigger already is left as it is, but for prefix and suffix."""
    prefix, suffix = _around(data)
    if lacks(caption, data):
        caption = rewrites.get((caption, data.trigger, data.mode)) or _placed(caption, data)
    return " ".join(part for part in (prefix.strip(), caption, suffix.strip()) if part)


def lacks(caption: str, data: DataArgs) -> bool:
    """Whether the trigger has to be put in: neither the caption nor what goes around it names it."""
    prefix, suffix = _around(data)
    return not named(f"{prefix} {caption} {suffix}", data.trigger)


def _around(data: DataArgs) -> tuple[str, str]:
    return data.prefix.replace("{trigger}", data.trigger), data.suffix.replace("{trigger}", data.trigger)


def named(caption: str, trigger: str) -> bool:
    """Whether the caption names the trigger, as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption) is not None


def _placed(caption: str, data: DataArgs) -> str:
    trigger = data.trigger
    if not caption:
        return trigger
    if data.mode == "style":
        return f"{caption.rstrip(' .,;')}, in the style of {trigger}"
    if data.mode in ("object", "face"):
        words = data.class_words or PEOPLE
        found = _class_word(caption, words)
        if found:
            return _instead(caption, found, data)
    return f"{trigger}, {caption}"


def _class_word(caption: str, words: Sequence[str]) -> re.Match[str] | None:
    """The first class word that stands alone (not in man-made, not in doghouse), with the article before it."""
    longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.search(
        rf"(?<![\w-])(?:(?P<article>an?|the)\s+)?(?P<word>{longest_first})(?![\w-])", caption, re.IGNORECASE
    )


def _instead(caption: str, found: re.Match[str], data: DataArgs) -> str:
    """The caption with the trigger for the class word. A face has a name, which takes no article."""
    name = f"{data.trigger} {found['word']}" if data.keep_class else data.trigger
    article = found["article"]
    if article and (data.mode == "object" or data.keep_class):
        if article.lower() != "the":
            article = article[0] + ("n" if data.trigger[0].lower() in "aeiou" else "")
        name = f"{article} {name}"
    return caption[: found.start()] + name + caption[found.end() :]
