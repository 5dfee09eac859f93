"""Captions -> Cond: encoded once, kept in shards on disk and in a bounded share of memory.

Captions get shards as pictures do, and no file each: fifty thousand pictures with a few orders of their captions
would flood the folder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.cache.shards import Key, Shards, digest, slug
from trainer.progress import Progress
from trainer.share import ALONE, Share
from trainer.types import Cond, ModelFamily

MEMORY = 256 * 2**20  # bytes


class TextCache:
    """Captions -> Cond, for a run that does not train text. What is new is encoded when it is asked for."""

    def __init__(self, folder: Path, family: ModelFamily, device: torch.device, *, memory: int = MEMORY) -> None:
        """Find what is there.

        Args:
            memory: bytes of conds that stay on the device; those longest unused are read from the disk again.
        """
        self._family, self._device, self._memory = family, device, memory
        self._encoders = {
            name: {"weights": family.fingerprint(name), "dtype": _dtype(encoder)}
            for name, encoder in family.text_encoders.items()
        }
        self._shards = Shards(folder)
        self.whole = False  # whether all that will be asked for is there
        self._conds: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # longest unused first
        self._bytes = 0

    def __call__(self, captions: Sequence[str]) -> Cond:
        """One row for each caption, on the device that the cache was made for."""
        rows = [self._row(caption) for caption in captions]
        return Cond(**{part: torch.cat([row[part] for row in rows]) for part in rows[0]})

    def prepare(self, captions: Iterable[str], share: Share = ALONE) -> None:
        """Encode what is missing of them, and write it down. Others are not expected from here on.

        Args:
            share: of several processes that all call this: each encodes its part.
        """
        mine = share.of(list(dict.fromkeys(captions)))
        missing = [caption for caption in mine if digest(self._key(caption)) not in self._shards]
        with Progress("encoding", len(missing), "caption") as progress:
            for caption in missing:
                self._encode(caption)
                progress.advance()
        self.flush()
        share.barrier()
        self._shards.scan()
        self.whole = True

    def flush(self) -> None:
        """Write down what was encoded since the last shard was full."""
        self._shards.flush()

    def _row(self, caption: str) -> dict[str, Tensor]:
        if caption in self._conds:
            self._conds.move_to_end(caption)
            return self._conds[caption]
        entry = digest(self._key(caption))
        if entry not in self._shards:
            self._encode(caption)
        row = {part: tensor.to(self._device) for part, tensor in self._shards.read(entry).items()}
        self._conds[caption] = row
        self._bytes += _size(row)
        while self._bytes > self._memory:
            self._bytes -= _size(self._conds.popitem(last=False)[1])
        return row

    def _encode(self, caption: str) -> None:
        with torch.no_grad():
            cond = self._family.encode([caption])
        parts = {part: tensor for part, tensor in vars(cond).items() if tensor is not None}
        self._shards.add(slug(caption), self._key(caption), parts)

    def _key(self, caption: str) -> Key:
        return {
            "kind": "text",
            "caption": caption,
            "tokens": {name: _tokens(tokenizer, caption) for name, tokenizer in self._family.tokenizers.items()},
            "family": self._family.name,
            "encoders": self._encoders,
        }


def _size(row: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in row.values())


def _tokens(tokenizer: Any, caption: str) -> list[int]:
    """The ids that the encoder is shown: they stand for the tokenizer's vocabulary, merges, length and padding."""
    return tokenizer(caption, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids


def _dtype(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype)
