"""Stage 2: every item gets a caption that names the trigger."""

from __future__ import annotations

import re
from dataclasses import replace

from preprocess.types import Item

VERSION = 1  # raise it when the same text would give another caption


def captioned(item: Item, trigger: str, default: str) -> Item:
    """The item with its own caption, or `default` where it has none; the trigger is put first if it lacks it.

    `{trigger}` in `default` stands for the trigger.
    """
    caption = item.caption or default.replace("{trigger}", trigger)
    if not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        caption = f"{trigger}, {caption}" if caption else trigger
    return replace(item, caption=caption)
