"""A base that pictures are drawn on, with any weights on it, which are exchanged without a trace."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trainer import layouts, registry, sampler, schedulers
from trainer.adapters.placeholders import Inserted, Placeholders, RowEmbedding, word_rows
from trainer.args import ModelArgs
from trainer.generate.find import Embedding, GenerateError, Weights
from trainer.generate.strength import Strength
from trainer.models import FAMILIES, sniff
from trainer.types import BaseModelError, ModelFamily


@dataclass(frozen=True)
class Word:
    """A trigger's vectors."""

    rows: Mapping[str, Tensor]  # text encoder -> [n, D], float32 on the CPU
    start: Mapping[str, Tensor]  # the same shapes: what they are at strength 0


@dataclass(frozen=True)
class Learned:
    """Weights in memory, for the base that they were read for. Their files are not needed any more."""

    name: str
    files: Mapping[str, str]  # name -> sha256 of the content
    updates: layouts.Updates
    words: Mapping[str, Word]  # by trigger


@dataclass(frozen=True)
class Weighted:
    """Weights, and how strongly they act."""

    learned: Learned
    strength: Strength = field(default_factory=Strength)


@dataclass(frozen=True)
class Look:
    """How pictures are drawn, whatever their prompts and seeds: as the arguments of `sampler.generate`."""

    steps: int = 25
    guidance: float = 3.0
    negative: str = ""
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    rescale: float = 0.0
    start: sampler.Start | None = None
    batch: int = 1


class Painter:
    """A base, and what is on it now: at first nothing."""

    def __init__(self, model: ModelArgs, device: torch.device, *, code: bool = True) -> None:
        """Loads the base.

        Args:
            code: False refuses a family that would import code.

        Raises:
            BaseModelError, PartError: the base cannot be used.
            GenerateError: what should be merged into it cannot.
        """
        self.model = model
        self.used: Sequence[Weighted] = ()
        kind: Any = registry.load(FAMILIES, sniff.named(model).family, "model.family", code=code)
        self.family: ModelFamily = kind.load(model, device)
        try:
            layouts.merge(self.family, model.merge)
        except layouts.LayoutError as error:
            raise GenerateError(f"model.merge: {error}") from error
        self.scheduler = schedulers.named(self.family.pipeline().scheduler)  # the base's own
        self._blend = layouts.Blend(self.family)
        self._inserted: Inserted | None = None

    def read(self, weights: Weights) -> Learned:
        """The weights in memory, known to fit the base. What is on it does not matter, and stays.

        Raises:
            GenerateError: they are damaged, or do not fit.
        """
        files = [embedding.file for embedding in weights.embeddings.values()]
        updates: layouts.Updates = {}
        try:
            if weights.lora is not None:
                files += [file for file, _ in layouts.files_of(weights.lora)]
                updates = layouts.read(weights.lora, self.family)
                layouts.check(self.family, updates)
            words = {trigger: self._word(trigger, embedding) for trigger, embedding in weights.embeddings.items()}
        except layouts.LayoutError as error:
            raise GenerateError(str(error)) from error
        except BaseModelError as error:
            raise GenerateError(f"the weights do not fit the base {self.model.base!r}: {error}") from error
        return Learned(weights.name, {file.name: _sha256(file) for file in files}, updates, words)

    def _word(self, trigger: str, embedding: Embedding) -> Word:
        rows = layouts.read_embedding(embedding.file, self.family, trigger)
        if len({len(vectors) for vectors in rows.values()}) > 1:
            held = ", ".join(f"{len(vectors)} for the {encoder}" for encoder, vectors in rows.items())
            raise GenerateError(f"{embedding.file.name} holds {held}, and a prompt has as many for each text encoder")
        start = {
            encoder: _start(
                _table(self.family.text_encoders[encoder]),
                self.family.tokenizers[encoder],
                embedding.start_words,
                len(vectors),
            )
            for encoder, vectors in rows.items()
        }
        return Word(rows, start)

    def use(self, weighted: Sequence[Weighted]) -> None:
        """Puts these on the base, and nothing else: what was on it before leaves no trace.

        A layer is W + sum of strength (W' - W); a token row is start + strength (trained - start), where start is the
        mean row of the words that it was trained from, or of the whole table where nobody says them.

        Raises:
            GenerateError: two of them stand for one trigger, or a block has no layer in them. What was on the base
                stays then.
        """
        words = _all_words(weighted)
        for one in weighted:
            _check_acts(one)
        if self._inserted is not None:
            self._inserted.take_out()
            self._inserted = None
        self._blend.set([(one.learned.updates, one.strength.of) for one in weighted])
        if words:
            placeholders = Placeholders(
                {trigger: len(next(iter(w.rows.values()))) for trigger, (w, _) in words.items()}
            )
            rows = {
                encoder: torch.cat([_blended(word, encoder, strength) for word, strength in words.values()])
                for encoder in self.family.text_encoders
            }
            self._inserted = Inserted(self.family, placeholders, rows, placeholders.expand)
        self.used = tuple(weighted)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        look: Look | None = None,
        drawn: Callable[[int], object] = lambda _: None,
    ) -> list[Image.Image]:
        """A picture for each prompt and its seed.

        Args:
            drawn: as for `sampler.generate`.

        Raises:
            SampleError, SchedulerError: it cannot be drawn so.
        """
        options = vars(look or Look())
        return sampler.generate(self.family, prompts, seeds=seeds, drawn=drawn, **options)


def _all_words(weighted: Sequence[Weighted]) -> dict[str, tuple[Word, float]]:
    """Every trigger's vectors with their strength."""
    found: dict[str, tuple[Word, float]] = {}
    of: dict[str, str] = {}
    for one in weighted:
        for trigger, word in one.learned.words.items():
            if trigger in found:
                raise GenerateError(
                    f"{of[trigger]} and {one.learned.name} both stand for the trigger {trigger!r}; give one of them "
                    f"another: --weights {one.learned.name} trigger=OTHER"
                )
            found[trigger], of[trigger] = (word, one.strength.of_tokens), one.learned.name
    return found


def _check_acts(one: Weighted) -> None:
    """A strength that is of nothing is a mistake."""
    learned, strength = one.learned, one.strength
    idle = strength.idle(learned.updates)
    if idle:
        parts = sorted({f"{component}.{path.split('.')[0]}" for component, path in learned.updates})
        raise GenerateError(
            f"{learned.name} changes no layer in {', '.join(idle)}, whose strength was given; it changes "
            f"{', '.join(parts) or 'no layers'}"
        )
    if strength.tokens is not None and not learned.words:
        raise GenerateError(f"{learned.name} has no token vectors, and their strength was given (tokens)")


def _blended(word: Word, encoder: str, strength: float) -> Tensor:
    """Exactly the start at 0 and the trained rows at 1."""
    return torch.lerp(word.start[encoder], word.rows[encoder], strength)


def _start(table: Tensor, tokenizer: Any, words: str, count: int) -> Tensor:
    return word_rows(table, tokenizer, words, count) if words else table.mean(dim=0, keepdim=True).repeat(count, 1)


def _table(text: Any) -> Tensor:
    """The base's own, [vocabulary, D] float32 on the CPU."""
    embedding = text.get_input_embeddings()
    own: Any = embedding.table if isinstance(embedding, RowEmbedding) else embedding
    table: Tensor = own.weight
    return table.detach().float().cpu()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in have.items() if there))
    if not have[name]:
        raise GenerateError(f"the device {name} is not on this machine; use auto or cpu")
    return torch.device(name)
