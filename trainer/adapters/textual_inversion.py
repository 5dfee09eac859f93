"""Textual inversion: vectors of their own for each trigger, joined to the frozen token table at lookup.

Only the new rows [n, D] exist as parameters (arXiv 2208.01618, without its reset of the old table): those of the
first trigger, then those of the second, the triggers in the order of the alphabet.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.adapters.layered import check_names
from trainer.adapters.placeholders import Inserted, Placeholders, RowEmbedding, word_rows
from trainer.adapters.row_penalties import ORDINARY, Covariance, condition_norm, condition_penalty, std_penalty
from trainer.adapters.similarity import approach_pictures
from trainer.args import TextArgs
from trainer.types import BaseModelError, ModelFamily


@dataclass(frozen=True)
class Concept:
    """What the vectors of one trigger start from."""

    trigger: str
    init_words: str | None = None  # None: those of the args
    pictures: Sequence[Tensor] = ()  # [3, h, w] each, -1..1; needed by the similarity start alone


class TextualInversion:
    """Learns `args.tokens` vectors for each trigger in every text encoder of a family.

    A trigger, where it stands as a word in a prompt, is replaced by its placeholder tokens.
    """

    component = "rows"

    def __init__(
        self, args: TextArgs, trigger: str | Sequence[Concept], seed: int, pictures: Sequence[Tensor] | None = None
    ) -> None:
        """Learns for one trigger or for several concepts, no two of which share a trigger.

        Args:
            pictures: those of a single trigger, as `Concept.pictures`.
        """
        if args.tokens < 1:
            raise ValueError(f"text.tokens is {args.tokens}; textual inversion needs at least 1")
        concepts = [Concept(trigger, pictures=pictures or ())] if isinstance(trigger, str) else trigger
        self.args = args
        self._concepts = sorted(concepts, key=lambda concept: concept.trigger)
        self.triggers = tuple(concept.trigger for concept in self._concepts)
        if not self.triggers or len(set(self.triggers)) < len(self.triggers):
            raise ValueError(f"textual inversion needs triggers that differ, and got {self.triggers}")
        self._words = Placeholders(dict.fromkeys(self.triggers, args.tokens))
        self._seed = seed
        self._on = True
        self._family: ModelFamily | None = None
        self._inserted: Inserted | None = None
        self._targets: dict[str, Tensor] = {}  # mean std of the frozen rows
        self._covariances: dict[str, Covariance] = {}  # of the frozen rows, where it is asked for
        self._usual: Tensor | None = None  # norm of an ordinary prompt's mean condition, likewise

    def attach(self, family: ModelFamily) -> list[tuple[str, nn.Parameter]]:
        """Gives every text encoder its rows and every tokenizer the placeholders."""
        if self._family is not None:
            raise RuntimeError("this textual inversion is attached already; detach it first")
        if self.args.condition_weight:
            with torch.no_grad():
                self._usual = condition_norm(family.encode(ORDINARY).hidden).mean()
        starts = {key: self._start(key, family) for key in family.text_encoders}
        for key, encoder in family.text_encoders.items():
            text: Any = encoder
            table = text.get_input_embeddings()
            self._targets[key] = table.weight.float().std(dim=1).mean()
            if self.args.covariance_weight:
                self._covariances[key] = Covariance.of(table.weight.detach())
        self._inserted = Inserted(family, self._words, starts, self.expand)
        self._family = family
        return [(f"{key}.rows", embedding.rows) for key, embedding in self._embeddings.items()]

    @property
    def _embeddings(self) -> Mapping[str, RowEmbedding]:
        return self._inserted.embeddings if self._inserted else {}

    def detach(self) -> None:
        """Puts the family's own tables and tokenizers back."""
        if self._inserted is None:
            return
        self._inserted.take_out()
        self._family, self._inserted, self._targets = None, None, {}
        self._covariances, self._usual = {}, None

    def expand(self, prompt: str) -> str:
        """The prompt with each trigger, as a word, replaced by its placeholder tokens."""
        return self._words.expand(prompt) if self._on else prompt

    def state_dict(self) -> dict[str, Tensor]:
        """Rows by the name that `attach` gave them (detached, sharing memory)."""
        return {f"{key}.rows": embedding.rows.detach() for key, embedding in self._embeddings.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies `state` into the rows; ValueError where it does not fit."""
        mine = {f"{key}.rows": embedding.rows for key, embedding in self._embeddings.items()}
        check_names(state, mine)
        for name, rows in mine.items():
            rows.copy_(state[name])

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Inside, the trigger is the plain text that it is to the base."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    @contextmanager
    def scaled(self, strength: float) -> Generator[None]:
        """Token rows have no strength, in the programs that load them as here: they stay on at every `strength`."""
        yield

    def penalty(self) -> Tensor | None:
        """The regularisers of `trainer.adapters.row_penalties`, each times its weight; None where all are off.

        Std and covariance are means over text encoders; the condition is that of "a photo of" each trigger.
        """
        args = self.args
        if self._family is None:
            return None
        parts: list[Tensor] = []
        if args.std_weight:
            each = [std_penalty(e.rows, self._targets[key].to(e.rows.device)) for key, e in self._embeddings.items()]
            parts.append(args.std_weight * torch.stack(each).mean())
        if args.covariance_weight:
            each = [self._covariances[key].distance(e.rows) for key, e in self._embeddings.items()]
            parts.append(args.covariance_weight * torch.stack(each).mean())
        if self._usual is not None:
            hidden = self._family.encode([f"a photo of {trigger}" for trigger in self.triggers]).hidden
            parts.append(args.condition_weight * condition_penalty(hidden, self._usual))
        return torch.stack(parts).sum() if parts else None

    def rows(self, trigger: str | None = None) -> Mapping[str, Tensor]:
        """Text encoder -> [n, D], for export: of one trigger, or of all, one after the other."""
        place = slice(None) if trigger is None else self._words.place(trigger)
        return {key: embedding.rows.detach()[place] for key, embedding in self._embeddings.items()}

    def _start(self, key: str, family: ModelFamily) -> Tensor:
        """[n, D] float32 on the CPU, by `args.init`."""
        text: Any = family.text_encoders[key]
        table: Tensor = text.get_input_embeddings().weight.detach().float().cpu()
        drawn = random_rows(table, len(self._words.names), self._seed)
        return torch.cat(
            [
                self._own_start(concept, drawn[self._words.place(concept.trigger)], key, family, table)
                for concept in self._concepts
            ]
        )

    def _own_start(self, concept: Concept, drawn: Tensor, key: str, family: ModelFamily, table: Tensor) -> Tensor:
        """The rows of one concept; `drawn` are its random ones."""
        words, tokens = concept.init_words or self.args.init_words or "", self.args.tokens
        if self.args.init == "words" or (self.args.init == "similarity" and words):
            drawn = word_rows(table, family.tokenizers[key], words, tokens)
        if self.args.init != "similarity":
            return drawn
        if key not in family.clip_folders:
            raise BaseModelError(
                f"text.init is similarity, but the base has no CLIP for its {key}; "
                "take init random or words, or put a CLIPModel that shares the text tower into the base's clip folder"
            )
        if not concept.pictures:
            raise ValueError("text.init is similarity, which needs the training pictures, and none were given")
        grown = self._words.grown(family.tokenizers[key], tokens)
        prompt = "a photo of " + "".join(self._words.names[:tokens])
        ids = torch.tensor([grown(prompt).input_ids[: grown.model_max_length]])
        return approach_pictures(
            family.clip_folders[key], drawn, ids, concept.pictures, end_id=grown.eos_token_id, wrap=RowEmbedding
        )


def random_rows(table: Tensor, count: int, seed: int) -> Tensor:
    """Gaussian rows [count, D] with the mean std of the table's rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, table.shape[1], generator=generator)
    rows = (rows - rows.mean(dim=1, keepdim=True)) / rows.std(dim=1, keepdim=True)
    return rows * table.std(dim=1).mean()
