"""How strongly weights act: all of them, and parts of a network more or less than the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from trainer.generate.find import GenerateError

SHORT = {"unet": "denoiser", "down": "down_blocks", "mid": "mid_block", "up": "up_blocks", "text": "text_encoder*"}
TOKENS, TRIGGER = "tokens", "trigger"


@dataclass(frozen=True)
class Strength:
    """`overall` for every layer and for token rows; `blocks` and `tokens` in its place where they are given.

    A block is `down`, `mid`, `up`, `unet`, `text`, or the beginning of a layer's name, with * for any text:
    `down_blocks.1`, `denoiser.up_blocks.0.attentions.1`, `text_encoder_2`, `*.attn2`. Where several are of one layer,
    the longest counts.
    """

    overall: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict[str, float])
    tokens: float | None = None

    def of(self, component: str, path: str) -> float:
        """Of a layer."""
        blocks = [block for block in self.blocks if _covers(block, component, path)]
        return self.blocks[max(blocks, key=lambda block: len(_long(block)))] if blocks else self.overall

    @property
    def of_tokens(self) -> float:
        return self.overall if self.tokens is None else self.tokens

    def times(self, factor: float) -> Strength:
        """All of it, `factor` times as strong."""
        blocks = {block: strength * factor for block, strength in self.blocks.items()}
        return Strength(self.overall * factor, blocks, None if self.tokens is None else self.tokens * factor)

    def idle(self, layers: Iterable[tuple[str, str]]) -> list[str]:
        """The blocks that none of the layers is in."""
        layers = list(layers)
        return [block for block in self.blocks if not any(_covers(block, *layer) for layer in layers)]


def parse(words: Sequence[str]) -> tuple[Strength, str | None]:
    """What stands behind a path, `0.8 down=0.5 tokens=1 trigger=KIT`, in any order; the strength and the trigger.

    Raises:
        GenerateError: a word is none of these, or one is given twice.
    """
    said: dict[str, float] = {}
    trigger: str | None = None
    for word in words:
        name, sign, value = word.rpartition("=")
        if name in said or (name == TRIGGER and trigger is not None):
            raise GenerateError(f"{name or 'the strength'} is given twice ({word}); once is enough")
        if sign and name == TRIGGER and value:
            trigger = value
        elif sign and not name:
            raise GenerateError(f"{word!r} names no block; write down=0.5")
        else:
            said[name] = _number(value, word)
    overall, tokens = said.pop("", 1.0), said.pop(TOKENS, None)
    return Strength(overall, said, tokens), trigger


def _number(text: str, word: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise GenerateError(
            f"{word!r} says no strength; behind a path stand a number (0.8), blocks with one (down=0.5, "
            "down_blocks.1=0, text=0, tokens=1), or trigger=WORD"
        )
    return number


def _long(block: str) -> str:
    return SHORT.get(block, block)


def _covers(block: str, component: str, path: str) -> bool:
    pattern = _pattern(_long(block))
    return bool(pattern.fullmatch(f"{component}.{path}") or (component == "denoiser" and pattern.fullmatch(path)))


@lru_cache(maxsize=256)
def _pattern(block: str) -> re.Pattern[str]:
    return re.compile(re.escape(block).replace(r"\*", ".*") + r"(\..*)?")
