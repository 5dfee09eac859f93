"""Words with vectors of their own: placeholder tokens in a family's tokenizers, rows beside its frozen token tables.

Shapes: B prompts, L tokens, D text width, n rows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from trainer.types import BaseModelError, ModelFamily


class RowEmbedding(nn.Module):
    """A token table whose ids from the frozen vocabulary on are rows of a parameter."""

    def __init__(self, table: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.table = table
        self.own = nn.ParameterList([rows])  # behind the table: a model's dtype is that of its first parameter
        self.vocab = table.num_embeddings

    @property
    def rows(self) -> nn.Parameter:
        """[n, D], trained; in another precision than the table's, as it may be."""
        return self.own[0]

    @property
    def weight(self) -> Tensor:
        """The whole table, old and new, as programs that inspect an embedding expect."""
        return torch.cat([self.table.weight, self.rows.to(self.table.weight)])

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, D] in the table's dtype."""
        new = ids >= self.vocab
        old: Tensor = self.table(ids.masked_fill(new, 0))
        rows = self.rows.to(old.dtype)[(ids - self.vocab).clamp(min=0)]
        return torch.where(new.unsqueeze(-1), rows, old)


class Placeholders:
    """Tokens that stand for triggers: as many for each as it has rows, in the order given."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        """Args: counts: trigger -> how many rows it has; at least one trigger."""
        self._places: dict[str, slice] = {}
        first = 0
        for trigger, count in counts.items():
            self._places[trigger] = slice(first, first + count)
            first += count
        self.names = [f"<concept-{i}>" for i in range(first)]
        longest_first = "|".join(re.escape(word) for word in sorted(counts, key=len, reverse=True))
        self._word = re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)")

    def place(self, trigger: str) -> slice:
        """Where its rows are among all."""
        return self._places[trigger]

    def expand(self, prompt: str) -> str:
        """The prompt with each trigger, as a word, replaced by its placeholder tokens."""
        return self._word.sub(lambda found: "".join(self.names[self._places[found[0]]]), prompt)

    def grown(self, tokenizer: Any, count: int | None = None) -> Any:
        """A copy of the tokenizer that knows the placeholders, or the first `count` of them.

        Raises:
            BaseModelError: it knows one of them already.
        """
        names = self.names[:count]
        grown = copy.deepcopy(tokenizer)
        grown.add_tokens([AddedToken(token, normalized=False) for token in names])
        ids: list[int] = grown.convert_tokens_to_ids(names)
        if ids != list(range(len(tokenizer), len(tokenizer) + len(ids))):
            raise BaseModelError(f"the base's tokenizer knows {self.names[0]} already; it cannot be trained on")
        return grown


class Inserted:
    """Rows in the text encoders of a family, until they are taken out."""

    def __init__(
        self, family: ModelFamily, words: Placeholders, rows: Mapping[str, Tensor], rule: Callable[[str], str]
    ) -> None:
        """Puts them in.

        Args:
            rows: [n, D] of all of `words`, for each of the family's text encoders.
            rule: what prompts go through, `words.expand` or what calls it.
        """
        self._family, self._rule = family, rule
        self._tokenizers = {key: family.tokenizers[key] for key in rows}  # put back by take_out
        grown = {key: words.grown(tokenizer) for key, tokenizer in self._tokenizers.items()}
        self.embeddings: dict[str, RowEmbedding] = {}
        for key, tensor in rows.items():
            text: Any = family.text_encoders[key]
            family.tokenizers[key] = grown[key]
            table = text.get_input_embeddings()
            self.embeddings[key] = RowEmbedding(table, tensor.to(table.weight.device))
            text.set_input_embeddings(self.embeddings[key])
        family.prompt_rules.append(rule)

    def take_out(self) -> None:
        """Puts the family's own tables and tokenizers back."""
        for key, embedding in self.embeddings.items():
            text: Any = self._family.text_encoders[key]
            text.set_input_embeddings(embedding.table)
            self._family.tokenizers[key] = self._tokenizers[key]
        self._family.prompt_rules.remove(self._rule)


def word_rows(table: Tensor, tokenizer: Any, words: str, count: int) -> Tensor:
    """`count` copies [count, D] of the mean row of the words' tokens.

    Raises:
        BaseModelError: the tokenizer makes no token of them.
    """
    ids: list[int] = tokenizer(words, add_special_tokens=False).input_ids
    if not ids:
        raise BaseModelError(f"text.init_words {words!r} holds no token that the base knows")
    return table[ids].mean(dim=0, keepdim=True).repeat(count, 1)
