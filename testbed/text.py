"""Tokenizer and text tower, pretrained on captions alone.

The tower learns to say every attribute of a caption through small linear heads, from its
end-of-text state and from a random position after it; then it is frozen, as in Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from testbed.pictures import COLOURS, FILLS, OPENINGS, POSITIONS, SIZES, Rng, Scene, caption
from testbed.shapes import SHAPES

LENGTH = 32  # tokens; the tokenizer and the position table agree on it
WIDTH = 128
SPECIALS = ("<|startoftext|>", "<|endoftext|>")
WORDS = ("picture", "style", "in", "the", "of", "and", "an", "photo", "drawing", "image", "painting", "with")


def make_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges were learned from captions; every byte stays spellable."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", show_progress=False, min_frequency=2)
    learner.train_from_iterator([*captions, *[" ".join(WORDS)] * 3], trainer)
    merges = [tuple(pair) for pair in _merges(learner)]
    tokens = [*alphabet, *[a + "</w>" for a in alphabet], *dict.fromkeys(a + b for a, b in merges), *SPECIALS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    tokenizer.model_max_length = LENGTH
    return tokenizer


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [
        tuple(m) if isinstance(m, list) else tuple(m.split(" "))
        for m in json.loads(learner.to_str())["model"]["merges"]
    ]


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer))


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """[B, LENGTH] ids, padded as Stable Diffusion pads."""
    return tokenizer(
        list(captions), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def spoken(scene: Scene, rng: Rng, *, unknown: float = 0.0) -> tuple[str, bool]:
    """(caption, shape known): a random opening; with chance `unknown` a made-up word for the first shape."""
    text = caption(scene, OPENINGS[int(rng.choice(len(OPENINGS), p=(0.7, 0.15, 0.15)))])
    if rng.random() >= unknown:
        return text, True
    letters = rng.integers(97, 123, int(rng.integers(2, 8)))
    return text.replace(scene.things[0].shape, "".join(map(chr, letters)), 1), False


HEADS: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "fill": FILLS,
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "background": tuple(COLOURS),
    "background2": ("none", *COLOURS),
    "shape2": ("none", *SHAPES),
    "colour2": ("none", *COLOURS),
}


def labels(scene: Scene, known: bool) -> list[int]:
    """Class index for each head; -100 where the caption does not say it."""
    first, second = scene.things[0], (scene.things[1] if len(scene.things) > 1 else None)
    values = {
        "shape": first.shape,
        "colour": first.colour,
        "fill": first.fill,
        "size": first.size,
        "position": first.position,
        "background": scene.background[0],
        "background2": scene.background[1] if len(scene.background) > 1 else "none",
        "shape2": second.shape if second else "none",
        "colour2": second.colour if second else "none",
    }
    return [-100 if head == "shape" and not known else HEADS[head].index(values[head]) for head in HEADS]


class TextTask(nn.Module):
    """The tower with its throw-away heads."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList([nn.Linear(WIDTH, len(names)) for names in HEADS.values()])

    def forward(self, ids: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(loss, share of attributes right) for ids [B, L] and target [B, heads]."""
        hidden = self.encoder(ids).last_hidden_state
        eos, later = ends(ids, self.encoder.config.eos_token_id, generator)
        rows = torch.arange(len(ids))
        read = [attributes(self.heads, states, target) for states in (hidden[rows, eos], hidden[rows, later])]
        return torch.stack([loss for loss, _ in read]).mean(), torch.stack([right for _, right in read]).mean()


def attributes(heads: nn.ModuleList, states: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, share right) of what the heads read from states [B, D]; a target of -100 is not asked for."""
    logits = [head(states) for head in heads]
    losses = [F.cross_entropy(x, target[:, i], ignore_index=-100) for i, x in enumerate(logits)]
    hits = [(x.argmax(1) == target[:, i])[target[:, i] >= 0].float().mean() for i, x in enumerate(logits)]
    return torch.stack(losses).mean(), torch.stack(hits).mean().detach()


def ends(ids: Tensor, eos: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions [B] of the end of text, and of random tokens from there on."""
    end = (ids == eos).int().argmax(1)
    later = end + (torch.rand(len(ids), generator=generator) * (ids.shape[1] - end)).long()
    return end, later.clamp(max=ids.shape[1] - 1)


def text_batch(tokenizer: CLIPTokenizer, scenes: Sequence[Scene], rng: Rng) -> tuple[Tensor, Tensor]:
    said = [spoken(scene, rng, unknown=0.15) for scene in scenes]
    target = np.array([labels(s, known) for s, (_, known) in zip(scenes, said, strict=True)])
    return tokens(tokenizer, [text for text, _ in said]), torch.from_numpy(target)
