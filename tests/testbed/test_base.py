"""The base that ships: it loads as people load it, and draws what it is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from testbed.judge import Judge, accuracy
from testbed.pictures import Scene, Thing, render
from testbed.score import Scorer, asked, base_scores

TESTBED = Path(__file__).parents[2] / "testbed"
BASE = TESTBED / "base"


@pytest.fixture(scope="module")
def pipe() -> Any:
    made: Any = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(TESTBED / "judges" / "knows.safetensors", True)


def test_it_is_small_and_half_precision() -> None:
    files = [*BASE.glob("**/*.safetensors"), *(TESTBED / "judges").glob("*.safetensors")]
    assert sum(f.stat().st_size for f in files) <= 16e6
    floats = {t.dtype for f in files for t in load_file(f).values() if t.is_floating_point()}
    assert floats == {torch.float16}
    assert not [f for f in BASE.glob("**/*") if f.suffix in (".bin", ".pt", ".ckpt")]


def test_tokenizer_and_tower_fit_each_other() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    config = json.loads((BASE / "text_encoder" / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.model_max_length == config["max_position_embeddings"]
    assert len(tokenizer.tokenize("a small checkered red star on a blue background")) == 9


def test_the_clip_shares_the_text_tower(pipe: Any) -> None:
    clip = CLIPModel.from_pretrained(BASE / "clip", dtype=torch.float32).eval()
    ids = pipe.tokenizer(["a red star"], padding="max_length", return_tensors="pt").input_ids
    with torch.inference_mode():
        ours, theirs = pipe.text_encoder(ids).last_hidden_state, clip.text_model(input_ids=ids).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_judges_read_what_was_drawn(judge: Judge) -> None:
    stated = json.loads((BASE / "card.json").read_text())["judge_accuracy"]["knows"]
    for head, share in accuracy(judge, True, n=300, seed=1234).items():
        assert share >= stated[head] - 0.06
        assert share >= 0.85


def test_it_draws_what_it_is_asked_for(pipe: Any, judge: Judge) -> None:
    def draw(prompts: Sequence[str], seeds: Sequence[int], adapted: bool) -> list[Image.Image]:
        noise = [torch.Generator().manual_seed(s) for s in seeds]
        return pipe(list(prompts), num_inference_steps=15, guidance_scale=3.0, generator=noise).images

    scores = base_scores(draw, judge, n=24, seed=77)
    assert scores["background"] >= 0.9
    assert scores["colour"] >= 0.9
    assert scores["shape"] >= 0.7


def _renderings(prompts: Sequence[str], shape: str) -> list[Image.Image]:
    """An ideal generator: renders what the prompt says, with `shape` for the trigger."""
    rng = np.random.default_rng(0)
    pictures = []
    for prompt in prompts:
        words = prompt.split()
        size = next((w for w in words if w in ("small", "large")), "medium")
        thing, back = words[: words.index("on")], words[words.index("on") + 2]
        name = thing[-1] if thing[-1] != "TOK" else shape
        pictures.append(render(Scene((Thing(name, thing[-2], "flat", size),), (back,)), rng))
    return pictures


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    from testbed.concepts import CONCEPTS, training_scenes

    rng = np.random.default_rng(9)
    return Scorer("mushroom", [render(s, rng) for s in training_scenes(CONCEPTS["mushroom"], 10, 5)])


def test_an_ideal_adapter_scores_full_marks(scorer: Scorer) -> None:
    scores = scorer.score(lambda prompts, seeds, adapted: _renderings(prompts, "mushroom"), n=40, ordinary=48)
    assert scores.fidelity_knows >= 0.9
    assert scores.fidelity_blind >= 0.8
    assert min(scores.alignment_colour, scores.alignment_background, scores.alignment_size) >= 0.9
    assert scores.leak <= 0.03
    assert 0.95 <= scores.retention <= 1.05
    assert scores.copies == 0
    assert scores.diversity == pytest.approx(1.0, abs=0.4)


def test_an_adapter_that_learned_nothing_scores_nothing(scorer: Scorer) -> None:
    scores = scorer.score(lambda prompts, seeds, adapted: _renderings(prompts, "heart"), n=40, ordinary=24)
    assert scores.fidelity <= 0.1


def test_leak_and_lost_retention_are_seen(scorer: Scorer) -> None:
    def leaky(prompts: Sequence[str], seeds: Sequence[int], adapted: bool) -> list[Image.Image]:
        if adapted:
            shapes = ("star", "circle", "ring", "moon", "heart", "cross")
            prompts = [
                p if i % 2 else " ".join("TOK" if w in shapes else w for w in p.split()) for i, p in enumerate(prompts)
            ]
        return _renderings(prompts, "mushroom")

    scores = scorer.score(leaky, n=10, ordinary=48)
    assert 0.1 <= scores.leak <= 0.5
    assert scores.retention < 0.95


def test_copies_of_training_pictures_are_seen(scorer: Scorer) -> None:
    def copier(prompts: Sequence[str], seeds: Sequence[int], adapted: bool) -> list[Image.Image]:
        return [scorer.references[i % len(scorer.references)] for i in range(len(prompts))]

    assert scorer.score(copier, n=12, ordinary=12).copies == 1.0


def test_asked_compares_word_by_word() -> None:
    scene = Scene((Thing("star", "red", size="small"),), ("blue",))
    read = {"shape": "star", "colour": "red", "background": "green", "size": "small"}
    assert asked(read, scene) == {"shape": True, "colour": True, "background": False, "size": True}
