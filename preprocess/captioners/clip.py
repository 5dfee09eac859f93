"""Captions by image-text similarity: a CLIP picks, for each slot of a template, the phrase that suits the picture best.

What a vocabulary is: see `vocabulary`.

A caption counts as exp(k x its similarity), as in CLIP's own loss but with half its learned k; a phrase counts as the
mean of all captions that hold it. So a slot is read whatever the others say, and a picture of something that no phrase
names is not described by the one caption that happens to come nearest. The first two slots, which belong together,
are chosen as a pair over a few fillings of the others; then every other slot over the fillings beside that pair.
A picture is seen five times, moved a little, because a patch grid sees another pattern each time.
Shapes: N pictures, D width of the common space, P pairs, F fillings.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from preprocess.captioners import Write, model
from preprocess.captioners.vocabulary import Vocabulary, read_vocabulary
from preprocess.types import Item, PreprocessError
from trainer.args import CaptionModelArgs

SHIPPED = Path(__file__).parents[2] / "testbed/base/clip"
_SOFTNESS = 0.5  # of the learned scale: sizes of shapes left out of the vocabulary are read best, fills hardly worse
_BESIDE_PAIRS = (8, 32)  # fewest and most fillings of the other slots that every pair is held against
_PAIR_TEXTS = 65_536  # what bounds them between the two
_BESIDE_ONE = 1_280  # fillings that the chosen pair is held against
_KEPT = 2**26  # numbers of the pairs whose fillings stay encoded
_TEXTS = 256  # encoded at once
_SHIFT = 1 / 32  # of the shorter side


@dataclass(frozen=True)
class Filled:
    """A template with a phrase in each slot."""

    phrases: tuple[str, ...]  # in the order of the slots

    def text(self, template: str, slots: Iterable[str]) -> str:
        plain = " ".join(template.format(**dict(zip(slots, self.phrases, strict=True))).split())
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", plain)


class Clip:
    """See the file's own description."""

    version = 2
    sees = True

    def __init__(self, options: CaptionModelArgs) -> None:
        model.check_used(options, "clip", {"vocabulary"})
        self._place = model.find(options, str(SHIPPED), None, {"clip"})
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
        with model.on_device(clip, model.device_of(self._options.device)) as clip:
            scale = float(clip.logit_scale.exp())
            picker = Picker(self._vocabulary, _text_encoder(clip, tokenizer), _SOFTNESS * scale)

            def write(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
                views = [view for image in images for view in moved(image)]
                pixels = processor(images=views, return_tensors="pt").pixel_values.to(clip.device)
                seen = clip.vision_model(pixel_values=pixels).pooler_output
                rows = F.normalize(clip.visual_projection(seen).float(), dim=-1)
                return picker(F.normalize(rows.view(len(images), -1, rows.shape[-1]).mean(1), dim=-1))

            yield write


def _text_encoder(clip: Any, tokenizer: Any) -> Callable[[list[str]], Tensor]:
    """Texts -> unit rows [N, D]."""
    length = clip.config.text_config.max_position_embeddings

    def encode(texts: list[str]) -> Tensor:
        # only as long as needed: what follows the end of a text does not change its row
        tokens = tokenizer(texts, padding=True, max_length=length, truncation=True, return_tensors="pt")
        said = clip.text_model(input_ids=tokens.input_ids.to(clip.device)).pooler_output
        return F.normalize(clip.text_projection(said).float(), dim=-1)

    return encode


def moved(image: Image.Image) -> list[Image.Image]:
    """The picture, and moved a little to each side with its edges repeated."""
    step = max(1, round(min(image.size) * _SHIFT))
    wide = np.pad(np.asarray(image), ((step, step), (step, step), (0, 0)), mode="edge")
    corners = [(step, step), (step, 0), (step, 2 * step), (0, step), (2 * step, step)]
    return [Image.fromarray(wide[y : y + image.height, x : x + image.width]) for x, y in corners]


class Picker:
    """Picture rows [N, D] -> captions.

    Args:
        sharpness: k of the file's description.
    """

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[list[str]], Tensor], sharpness: float) -> None:
        self._vocabulary, self._encode, self._sharpness = vocabulary, encode, sharpness
        self._slots = list(vocabulary.slots)
        phrases = list(vocabulary.slots.values())
        self._pairs = list(itertools.product(*phrases[:2]))
        self._others = phrases[2:]
        self._rests = fillings(self._others, _BESIDE_ONE)
        self._pair_rows: Tensor | None = None
        self._rest_rows: dict[tuple[str, ...], Tensor] = {}

    def __call__(self, pictures: Tensor) -> list[str]:
        template = self._vocabulary.write or self._vocabulary.compare
        chosen = [self._pairs[i] for i in self._pair_scores(pictures).argmax(1).tolist()]
        return [
            Filled((*pair, *self._rest(picture, pair))).text(template, self._slots)
            for picture, pair in zip(pictures, chosen, strict=True)
        ]

    def _pair_scores(self, pictures: Tensor) -> Tensor:
        """[N, P]"""
        if self._pair_rows is None:
            fewest, most = _BESIDE_PAIRS
            beside = fillings(self._others, max(fewest, min(most, _PAIR_TEXTS // len(self._pairs))))
            rows = self._read([Filled((*pair, *rest)) for pair in self._pairs for rest in beside])
            self._pair_rows = rows.view(len(self._pairs), len(beside), -1)
        return torch.stack([(self._sharpness * (self._pair_rows @ one)).logsumexp(1) for one in pictures])

    def _rest(self, picture: Tensor, pair: tuple[str, ...]) -> list[str]:
        """The best phrase of every slot after the pair's."""
        if not self._others:
            return []
        weights = (self._sharpness * (self._beside(pair) @ picture)).softmax(0).tolist()
        best: list[str] = []
        for slot, phrases in enumerate(self._others):
            total, seen = dict.fromkeys(phrases, 0.0), Counter(rest[slot] for rest in self._rests)
            for rest, weight in zip(self._rests, weights, strict=True):
                total[rest[slot]] += weight
            best.append(max(phrases, key=lambda phrase: total[phrase] / seen[phrase]))
        return best

    def _beside(self, pair: tuple[str, ...]) -> Tensor:
        """Rows [F, D] of the pair with all fillings of the other slots."""
        kept = self._rest_rows
        if pair not in kept:
            kept[pair] = self._read([Filled((*pair, *rest)) for rest in self._rests])
            while len(kept) > 1 and len(kept) * kept[pair].numel() > _KEPT:
                del kept[next(iter(kept))]
        return kept[pair]

    def _read(self, filled: list[Filled]) -> Tensor:
        """Unit rows of the texts [.., D]."""
        texts = [one.text(self._vocabulary.compare, self._slots) for one in filled]
        return torch.cat([self._encode(texts[start : start + _TEXTS]) for start in range(0, len(texts), _TEXTS)])


def fillings(slots: Sequence[Sequence[str]], limit: int) -> list[tuple[str, ...]]:
    """All ways to fill the slots, or where there are more than `limit`, that many at random.

    Every phrase of a slot then turns up equally often, and at least once: more phrases than `limit` raise it.
    """
    if math.prod(len(phrases) for phrases in slots) <= limit:
        return list(itertools.product(*slots))
    rng = random.Random(0)  # the same fillings for ever: nothing but the vocabulary decides
    limit = max(limit, *(len(phrases) for phrases in slots))
    columns = [[phrases[i % len(phrases)] for i in range(limit)] for phrases in slots]
    for column in columns:
        rng.shuffle(column)
    return list(zip(*columns, strict=True))


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
