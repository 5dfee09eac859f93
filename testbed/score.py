"""The scorer: does it draw the concept, obey the rest of the prompt, and still draw everything else?

It asks for pictures through one function, `draw(prompts, seeds, adapted)`, and reads them with the
judges and the CLIP that ship.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from testbed.concepts import CONCEPTS, TRIGGER, Concept, ordinary_scenes, training_scenes, unseen_scenes
from testbed.judge import Judge, one_thing, tensor
from testbed.pictures import Scene, caption, render
from testbed.shapes import SHAPES

HERE = Path(__file__).parent
FALSE_POSITIVES = 0.05  # of ordinary renderings that the blind judge may take for the concept
ORDINARY = 960  # renderings that the blind measure of likeness is fitted on
SHRINK = 0.1  # of the mean variance, added to each feature's
COPY_RMS = 0.04  # pixels in 0..1; two renderings of one scene differ by more


class Draw(Protocol):
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], adapted: bool) -> list[Image.Image]: ...


@dataclass(frozen=True)
class Scores:
    """Shares in 0..1 over n pictures; clip_* are cosines in -1..1."""

    fidelity_knows: float  # pictures that the judge with the concept among its classes calls it
    fidelity_blind: float  # pictures that the judge which never saw it holds for the reference pictures' kind
    alignment_colour: float
    alignment_background: float
    alignment_size: float
    retention: float  # ordinary prompts drawn right, as a share of the base's own
    base_right: float  # the base's own share
    leak: float  # ordinary prompts that turned into the concept
    diversity: float  # mean distance between samples of one prompt / the same of renderings
    copies: float  # samples that are a training picture again
    clip_image: float  # mean cosine to the training pictures
    clip_text: float  # mean cosine to the prompt with the concept's word left out
    n: int

    @property
    def fidelity(self) -> float:
        """The stricter of the two judges."""
        return min(self.fidelity_knows, self.fidelity_blind)

    def rows(self) -> dict[str, float]:
        return {"fidelity": self.fidelity, **asdict(self)}


class Scorer:
    """Judges, CLIP and the reference pictures of one concept."""

    def __init__(
        self, name: str, pictures: Sequence[Image.Image], seed: int = 5, here: Path = HERE, trigger: str = TRIGGER
    ) -> None:
        self.trigger = trigger
        self.concept: Concept = CONCEPTS[name]
        self.references = list(pictures)
        self.seen = training_scenes(self.concept, len(pictures), seed)
        self.knows = Judge.load(here / "judges" / "knows.safetensors", True)
        self.blind = Judge.load(here / "judges" / "blind.safetensors", False)
        self.clip = CLIPModel.from_pretrained(here / "base" / "clip", dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(here / "base" / "tokenizer")
        self._learn_what_is_ordinary()
        self.threshold = self._threshold()

    def score(self, draw: Draw, n: int = 60, ordinary: int = 96, seed: int = 0) -> Scores:
        scenes = unseen_scenes(self.concept, n, seed, self.seen)
        pictures = draw([self.concept.prompt(s, self.trigger) for s in scenes], range(1000, 1000 + n), True)
        read = self.knows.read(pictures)
        plain = ordinary_scenes(ordinary, seed)
        said, seeds = [caption(s) for s in plain], range(5000, 5000 + ordinary)
        before, after = (
            self._right(plain, draw(said, seeds, False)),
            self._right(plain, (kept := draw(said, seeds, True))),
        )
        return Scores(
            fidelity_knows=_share([r[self.concept.kind] == self.concept.value for r in read]),
            fidelity_blind=_share((self._likeness(pictures) > self.threshold).tolist()),
            alignment_colour=_share([r["colour"] == s.things[0].colour for r, s in zip(read, scenes, strict=True)]),
            alignment_background=_share(
                [r["background"] == s.background[0] for r, s in zip(read, scenes, strict=True)]
            ),
            alignment_size=_share([r["size"] == s.things[0].size for r, s in zip(read, scenes, strict=True)]),
            retention=after / max(before, 1e-9),
            base_right=before,
            leak=_share([r[self.concept.kind] == self.concept.value for r in self.knows.read(kept)]),
            diversity=self._diversity(draw, scenes[0]),
            copies=_share([self._nearest(p) < COPY_RMS for p in pictures]),
            clip_image=float((self._image(pictures) @ self._image(self.references).T).mean()),
            clip_text=float(
                (self._image(pictures) * self._text([_without(self.concept, s) for s in scenes])).sum(1).mean()
            ),
            n=n,
        )

    def _right(self, scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> float:
        """Share of pictures with shape, colour, background and size as asked."""
        return _share([all(asked(r, s).values()) for r, s in zip(self.knows.read(pictures), scenes, strict=True)])

    def _marks(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The blind judge's features of the pictures, centred and whitened; [B, 96]."""
        with torch.inference_mode():
            return (self.blind.features(tensor(pictures)) - self._centre) @ self._whiten

    def _likeness(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Cosine [B] of their marks to the mean of the reference pictures' marks."""
        return F.cosine_similarity(self._marks(pictures), self._marks(self.references).mean(0)[None], dim=1)

    def _learn_what_is_ordinary(self) -> None:
        """Centre, and whitening (as in linear discriminant analysis), of features over scenes that the base knows.

        Whitened by their spread within the classes of the concept's kind, features keep what tells one shape from
        another and lose what colour and size do to them. A style has no classes to learn that from: only centred.
        """
        rng = np.random.default_rng(17)
        scenes = [one_thing(rng, knows=False) for _ in range(ORDINARY)]
        with torch.inference_mode():
            features = self.blind.features(tensor([render(s, rng) for s in scenes]))
            plain = self.blind.features(tensor([render(s, rng) for s in ordinary_scenes(ORDINARY, 17)]))
        self._centre, self._whiten = plain.mean(0), torch.eye(features.shape[1])
        if self.concept.kind == "style":
            return
        names = [getattr(s.things[0], self.concept.kind) for s in scenes]
        groups = [features[[n == name for n in names]] for name in sorted(set(names))]
        within = torch.cat([group - group.mean(0) for group in groups])
        spread = within.T @ within / len(within)
        spread += SHRINK * spread.diagonal().mean() * torch.eye(len(spread))
        values, vectors = torch.linalg.eigh(spread)
        self._whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T

    def _threshold(self) -> float:
        """The likeness that only FALSE_POSITIVES of ordinary renderings pass."""
        rng = np.random.default_rng(18)
        ordinary = [render(s, rng) for s in ordinary_scenes(40 * len(SHAPES), 17)]
        return float(torch.quantile(self._likeness(ordinary), 1 - FALSE_POSITIVES))

    def _image(self, pictures: Sequence[Image.Image]) -> Tensor:
        with torch.inference_mode():
            return F.normalize(
                self.clip.visual_projection(self.clip.vision_model(pixel_values=tensor(pictures)).pooler_output), dim=-1
            )

    def _text(self, captions: Sequence[str]) -> Tensor:
        ids = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.inference_mode():
            return F.normalize(self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output), dim=-1)

    def _diversity(self, draw: Draw, scene: Scene) -> float:
        rng = np.random.default_rng(3)
        drawn = draw([self.concept.prompt(scene, self.trigger)] * 8, range(9000, 9008), True)
        return _spread(drawn) / _spread([render(scene, rng) for _ in range(8)])

    def _nearest(self, picture: Image.Image) -> float:
        return min(_rms(picture, other) for other in self.references)


def asked(read: dict[str, str], scene: Scene) -> dict[str, bool]:
    """Which of shape, colour, background and size are as the scene says."""
    thing = scene.things[0]
    wanted = {"shape": thing.shape, "colour": thing.colour, "background": scene.background[0], "size": thing.size}
    return {name: read[name] == value for name, value in wanted.items()}


def base_scores(draw: Draw, judge: Judge, n: int = 240, seed: int = 0) -> dict[str, float]:
    """How well the base draws simple prompts (shape, colour, background, size)."""
    scenes = ordinary_scenes(n, seed)
    read = judge.read(draw([caption(s) for s in scenes], range(n), False))
    hits = [asked(r, s) for r, s in zip(read, scenes, strict=True)]
    by_shape = {
        f"shape_{name}": _share([h["shape"] for h, s in zip(hits, scenes, strict=True) if s.things[0].shape == name])
        for name in SHAPES
    }
    return {
        "all": _share([all(h.values()) for h in hits]),
        **{k: _share([h[k] for h in hits]) for k in hits[0]},
        **by_shape,
    }


def full_scores(draw: Draw, judge: Judge, n: int = 120, seed: int = 0) -> dict[str, float]:
    """How well the base draws prompts that may also ask for a fill, a place and a gradient background."""
    rng = np.random.default_rng((seed, 8))
    scenes = [one_thing(rng, knows=False) for _ in range(n)]
    read = judge.read(draw([caption(s) for s in scenes], range(20_000, 20_000 + n), False))
    hits: list[dict[str, bool]] = []
    for r, s in zip(read, scenes, strict=True):
        thing = s.things[0]
        hits.append({**asked(r, s), "fill": r["fill"] == thing.fill, "position": r["position"] == thing.position})
    return {"all": _share([all(h.values()) for h in hits]), **{k: _share([h[k] for h in hits]) for k in hits[0]}}


def _without(concept: Concept, scene: Scene) -> str:
    text = concept.prompt(scene)
    return text.replace(", in the style of TOK", "").replace("TOK ", "shape " if concept.kind == "shape" else "", 1)


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _rms(a: Image.Image, b: Image.Image) -> float:
    x, y = (np.asarray(p.convert("RGB").resize((64, 64)), np.float32) / 255 for p in (a, b))
    return float(np.sqrt(((x - y) ** 2).mean()))


def _spread(pictures: Sequence[Image.Image]) -> float:
    return float(np.mean([_rms(a, b) for i, a in enumerate(pictures) for b in pictures[:i]]))
