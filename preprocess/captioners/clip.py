"""Captions by image-text similarity: a CLIP picks, for each slot of a template, the phrase that suits the picture best.

A vocabulary is a JSON file:

    {"compare": "a {colour} {shape} on a {background} background",
     "write": "a {colour} shape on a {background} background",
     "slots": {"colour": ["red", "green"], "background": ["white", "black"], "shape": ["cat", "dog"]}}

`compare` is what the picture is held against, `write` the caption (as `compare` when it is left out). An empty phrase
is allowed, and a becomes an before a vowel. The first two slots, which belong together, are chosen as a pair over
random fillings of the others; then every slot in turn with the others as they are, until nothing changes.
Shapes: N pictures, D width of the common space.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import string
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.nn import functional as F

from preprocess.captioners import Write, model
from preprocess.types import Item, PreprocessError
from trainer.args import CaptionModelArgs

SHIPPED = Path(__file__).parents[2] / "testbed/base/clip"
_FILLINGS = 8  # of the other slots, that a pair is held against
_ROUNDS = 4
_PAIRS = 20_000  # of the first two slots
_TEXTS = 256  # encoded at once


class Vocabulary(BaseModel):
    """What a vocabulary file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compare: str
    write: str | None = None
    slots: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Filled:
    """A template with a phrase in each slot."""

    phrases: tuple[str, ...]  # in the order of the slots

    def text(self, template: str, slots: Iterable[str]) -> str:
        plain = " ".join(template.format(**dict(zip(slots, self.phrases, strict=True))).split())
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", plain)

    def replaced(self, slot: int, phrase: str) -> Filled:
        return Filled((*self.phrases[:slot], phrase, *self.phrases[slot + 1 :]))


class Clip:
    """See the file's own description."""

    version = 1
    sees = True

    def __init__(self, options: CaptionModelArgs) -> None:
        if options.prompt is not None:
            raise PreprocessError(
                "data.caption_model.prompt is for blip and florence2; clip reads a vocabulary instead"
            )
        self._place = model.find(options, str(SHIPPED), None, "clip")
        self._options = options
        self._vocabulary_file = _vocabulary_file(options, self._place)
        self._vocabulary = read_vocabulary(self._vocabulary_file)
        self._tokenizer = _tokenizer_folder(self._place)

    def parameters(self) -> Mapping[str, Any]:
        tokenizer = None if self._tokenizer is None else model.fingerprint(self._tokenizer)
        return {
            "model": self._place.fingerprint(),
            "tokenizer": tokenizer,
            "vocabulary": self._vocabulary.model_dump(mode="json"),
            "side": self._options.side,
        }

    @contextmanager
    def loaded(self) -> Generator[Write]:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        where: dict[str, Any] = {
            "pretrained_model_name_or_path": self._place.base,
            "revision": self._place.revision or "main",
        }
        names = {**where, "pretrained_model_name_or_path": str(self._tokenizer)} if self._tokenizer else where
        try:
            clip: Any = CLIPModel.from_pretrained(**where, dtype=torch.float32, use_safetensors=True)
            processor: Any = AutoImageProcessor.from_pretrained(**where, backend="pil")
            tokenizer: Any = AutoTokenizer.from_pretrained(**names)
        except (OSError, ValueError) as error:
            raise PreprocessError(f"the captioner's CLIP {self._place.base!r} cannot be loaded: {error}") from error
        with model.on_device(clip, self._options.device) as clip:
            picker = Picker(self._vocabulary, _text_encoder(clip, tokenizer))

            def write(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
                pixels = processor(images=list(images), return_tensors="pt").pixel_values.to(clip.device)
                seen = clip.vision_model(pixel_values=pixels).pooler_output
                return picker(F.normalize(clip.visual_projection(seen).float(), dim=-1))

            yield write


def _text_encoder(clip: Any, tokenizer: Any) -> Callable[[list[str]], Tensor]:
    """Texts -> unit rows [N, D]."""
    length = clip.config.text_config.max_position_embeddings

    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        said = clip.text_model(input_ids=tokens.input_ids.to(clip.device)).pooler_output
        return F.normalize(clip.text_projection(said).float(), dim=-1)

    return encode


class Picker:
    """Picture rows [N, D] -> captions. Texts that were encoded are kept while the model is loaded."""

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[list[str]], Tensor]) -> None:
        self._vocabulary, self._encode = vocabulary, encode
        self._slots = list(vocabulary.slots)
        self._phrases = list(vocabulary.slots.values())
        self._rows: dict[str, Tensor] = {}
        self._start: tuple[list[Filled], Tensor] | None = None

    def __call__(self, pictures: Tensor) -> list[str]:
        starts, rows = self._starts()
        chosen = [starts[i] for i in (pictures @ rows.T).argmax(1).tolist()]
        order = [*range(2, len(self._slots)), *range(min(2, len(self._slots)))]
        for _ in range(_ROUNDS):
            before = chosen
            for slot in order:
                chosen = self._improved(pictures, chosen, slot)
            if chosen == before:
                break
        template = self._vocabulary.write or self._vocabulary.compare
        return [filled.text(template, self._slots) for filled in chosen]

    def _improved(self, pictures: Tensor, chosen: list[Filled], slot: int) -> list[Filled]:
        """Each picture's filling with the best phrase in `slot`, the rest as it is."""
        options = [[filled.replaced(slot, phrase) for phrase in self._phrases[slot]] for filled in chosen]
        self._read(list(itertools.chain.from_iterable(options)))
        return [
            filled[int((self._read(filled) @ picture).argmax())]
            for filled, picture in zip(options, pictures, strict=True)
        ]

    def _starts(self) -> tuple[list[Filled], Tensor]:
        """Every pair of the first two slots, and its mean row [pairs, D] over fillings of the others."""
        if self._start is None:
            rng = random.Random(0)  # the same fillings for ever: nothing but the vocabulary decides
            others = [tuple(rng.choice(phrases) for phrases in self._phrases[2:]) for _ in range(_FILLINGS)]
            pairs = list(itertools.product(*self._phrases[:2]))
            rows = [self._read([Filled((*pair, *rest)) for rest in others]).mean(0) for pair in pairs]
            plain = tuple(phrases[0] for phrases in self._phrases[2:])
            self._start = [Filled((*pair, *plain)) for pair in pairs], torch.stack(rows)
        return self._start

    def _read(self, fillings: list[Filled]) -> Tensor:
        """Unit rows of the texts [N, D]."""
        texts = [filled.text(self._vocabulary.compare, self._slots) for filled in fillings]
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        for start in range(0, len(new), _TEXTS):
            part = new[start : start + _TEXTS]
            self._rows.update(zip(part, self._encode(part), strict=True))
        return torch.stack([self._rows[text] for text in texts])


def read_vocabulary(path: Path) -> Vocabulary:
    """Raises PreprocessError for a file that is no vocabulary."""
    try:
        vocabulary = Vocabulary.model_validate(json.loads(path.read_text(encoding="utf-8")))
        return _checked(vocabulary)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PreprocessError(f"data.caption_model.vocabulary {str(path)!r} cannot be read as JSON: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PreprocessError(
            f"data.caption_model.vocabulary {str(path)!r} is no vocabulary: {where}: {first['msg']}"
        ) from error
    except ValueError as error:
        raise PreprocessError(f"data.caption_model.vocabulary {str(path)!r} is no vocabulary: {error}") from error


def _checked(vocabulary: Vocabulary) -> Vocabulary:
    slots = vocabulary.slots
    if not slots or not all(slots.values()):
        raise ValueError("it needs at least one slot, and a phrase in each")
    compared = _fields(vocabulary.compare)
    if compared != set(slots):
        raise ValueError(f"compare names the slots {_listed(compared)}, and slots holds {_listed(slots)}")
    if unknown := _fields(vocabulary.write or "") - set(slots):
        raise ValueError(f"write names {_listed(unknown)}, and slots holds {_listed(slots)}")
    first = list(slots.values())[:2]
    pairs = len(first[0]) * (len(first[1]) if len(first) > 1 else 1)
    if pairs > _PAIRS:
        raise ValueError(f"its first two slots make {pairs} pairs, and {_PAIRS} are allowed; put shorter slots first")
    return vocabulary


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _vocabulary_file(options: CaptionModelArgs, place: model.Place) -> Path:
    if options.vocabulary is not None:
        return Path(options.vocabulary).expanduser()
    beside = place.folder / "vocabulary.json" if place.folder else None
    if beside is None or not beside.is_file():
        raise PreprocessError(
            f"the CLIP {place.base!r} comes without a vocabulary.json; name a file of phrases in "
            "data.caption_model.vocabulary"
        )
    return beside


def _tokenizer_folder(place: model.Place) -> Path | None:
    """Where a local model's tokenizer lies: with it, or beside it as in a diffusers folder. None for a hub id."""
    if place.folder is None:
        return None
    for folder in (place.folder, place.folder.parent / "tokenizer"):
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            return folder
    raise PreprocessError(f"the CLIP {place.base!r} has no tokenizer, neither in its folder nor in tokenizer beside it")
