"""The trigger in captions, by mode, with prefix, suffix and class word."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from preprocess import Item
from preprocess.trigger import triggered, with_trigger
from trainer.args import DataArgs


def data(**options: Any) -> DataArgs:
    return DataArgs.model_validate({"source": "", **options})


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"mode": "style"}, "a cat on a roof.", "a cat on a roof, in the style of TOK"),
        ({"mode": "style"}, "", "TOK"),
        ({"mode": "style"}, "a drawing by TOK", "a drawing by TOK"),
        ({"mode": "object", "class_words": ["dog"]}, "a red dog on a dog bed", "a red TOK on a dog bed"),
        ({"mode": "object", "class_words": ["dog"]}, "A dog.", "A TOK."),
        ({"mode": "object", "class_words": ["apple"]}, "an apple", "a TOK"),
        ({"mode": "object", "class_words": ["dog"], "trigger": "ohwx"}, "a dog", "an ohwx"),
        ({"mode": "object", "class_words": ["dog"]}, "the Dog sleeps", "the TOK sleeps"),
        ({"mode": "object", "class_words": ["dog"]}, "a doghouse", "TOK, a doghouse"),
        ({"mode": "object", "class_words": ["dog"]}, "a hot-dog", "TOK, a hot-dog"),
        ({"mode": "object", "class_words": ["dog"]}, "a dog-like thing", "TOK, a dog-like thing"),
        ({"mode": "object", "class_words": ["dog"]}, "the dog's tail", "the TOK's tail"),
        ({"mode": "object", "class_words": ["dog"]}, "a cat", "TOK, a cat"),
        ({"mode": "object", "class_words": ["golden", "golden retriever"]}, "a golden retriever", "a TOK"),
        ({"mode": "object", "class_words": ["c++ (book)"]}, "the c++ (book) here", "the TOK here"),
        ({"mode": "object", "class_words": ["dog"], "keep_class": True}, "a red dog", "a red TOK dog"),
        ({"mode": "object", "class_words": ["apple"], "keep_class": True}, "an apple", "a TOK apple"),
        ({"mode": "face"}, "a man with a hat", "TOK with a hat"),
        ({"mode": "face"}, "a photo of a young woman", "a photo of a young TOK"),
        ({"mode": "face"}, "photo of the man and a woman", "photo of TOK and a woman"),
        ({"mode": "face"}, "man-made, with fireman", "TOK, man-made, with fireman"),
        ({"mode": "face", "class_words": ["woman"]}, "a man and a woman", "a man and TOK"),
        ({"mode": "face", "keep_class": True}, "a man with a hat", "a TOK man with a hat"),
        ({"prefix": "photo,"}, "a cat", "photo, TOK, a cat"),
        ({"prefix": "a photo of {trigger},"}, "a cat", "a photo of TOK, a cat"),
        ({"suffix": ", by {trigger}"}, "a cat", "a cat , by TOK"),
        ({"prefix": "x", "suffix": "y"}, "TOK", "x TOK y"),
        ({"trigger": r"\1"}, "a cat", r"\1, a cat"),
        ({"trigger": r"\g<0>", "mode": "object", "class_words": ["cat"]}, "a cat", r"a \g<0>"),
    ],
)
def test_one_caption(options: dict[str, Any], before: str, after: str) -> None:
    assert with_trigger(before, data(**options)) == after
    if not {"prefix", "suffix"} & set(options):
        assert with_trigger(after, data(**options)) == after


def item(name: str, caption: str, *captions: str) -> Item:
    return Item(name, f"{name}.png", "0", 8, 8, f"{name}.png", caption, captions=captions)


def test_all_captions_of_a_picture_and_what_is_told(caplog: pytest.LogCaptureFixture) -> None:
    items = [item("a", "one", "one", "two TOK"), item("b", "TOK")]
    with caplog.at_level(logging.INFO, "preprocess"):
        done = triggered(items, data())
    assert (done[0].caption, done[0].captions) == ("TOK, one", ("TOK, one", "two TOK"))
    assert (done[1].caption, done[1].captions) == ("TOK", ())
    assert [record.message for record in caplog.records] == ["a.png: 'one' becomes 'TOK, one'"]


def test_many_changes_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "preprocess"):
        triggered([item(f"p{i}", "x") for i in range(13)], data())
    assert len(caplog.records) == 11
    assert caplog.records[-1].message == "and 3 more captions in the same way"
