"""Prompts to token ids for CLIP text towers.

Shapes: B prompts, L tokens.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.types import BaseModelError

log = logging.getLogger(__name__)


class Tokens:
    """Token ids as the stock pipelines make them; a prompt that is cut is named once in the log."""

    def __init__(self) -> None:
        self._too_long: set[str] = set()

    def ids(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        """[B, L] int64, padded to the tokenizer's length."""
        length: int = tokenizer.model_max_length
        rows: list[list[int]] = tokenizer(list(prompts)).input_ids
        for i, row in enumerate(rows):
            if len(row) > length:
                rows[i] = [*row[: length - 1], row[-1]]
                if prompts[i] not in self._too_long:
                    self._too_long.add(prompts[i])
                    log.warning("only the first %d of %d tokens count in: %s", length, len(row), prompts[i])
            else:
                rows[i] = row + [tokenizer.pad_token_id] * (length - len(row))
        return torch.tensor(rows)


def places(tokenizer: Any, prompts: Sequence[str], words: Sequence[str]) -> Tensor:
    """[B, L] bool: which of `Tokens.ids` the word of each prompt became, at each of its places; none for an empty word.

    A word counts where no letter or digit touches it; one may be several tokens.
    """
    length: int = tokenizer.model_max_length
    found = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, (prompt, word) in enumerate(zip(prompts, words, strict=True)):
        if not word:
            continue
        spans = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt)]
        offsets: list[tuple[int, int]] = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
        for place, (start, end) in enumerate(offsets[: length - 1]):  # a prompt that is cut ends in its end token
            found[row, place] = any(start < last and first < end for first, last in spans)
    return found


def fit(tokenizer: Any, text: Any) -> None:
    """Bounds the tokenizer's length by the tower's positions.

    Raises:
        BaseModelError: they are not of one model. A missing tokenizer, say, loads as junk without an error.
    """
    if len(tokenizer) != text.vocab_size:
        raise BaseModelError(
            f"the base's tokenizer has {len(tokenizer)} tokens and its text encoder {text.vocab_size}; "
            "is the tokenizer folder missing or from another model?"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
