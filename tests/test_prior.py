"""The prior without class pictures: class words stay what they are to the base, and the trigger alone changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from small import items, latents

from trainer import cli, concepts, run
from trainer.dataset import Dataset
from trainer.run import assembly


def test_a_prior_needs_class_words() -> None:
    with pytest.raises(cli.CommandError, match=r"prior_weight is 1, but data\.class_words names no word"):
        cli.validate({"data": {"source": "x"}, "objective": {"prior_weight": 1.0}})


def test_class_words_stand_where_the_trigger_stood_as_a_word() -> None:
    data = cli.validate({"data": {"source": "x", "trigger": "TOK", "class_words": ["dog", r"a\1"]}}).data
    [item] = items([(32, 32)])
    told = concepts.priors(data, [item.__class__(**{**vars(item), "caption": "TOK in TOKYO, a TOK"})])
    assert told == {item.name: ["dog in TOKYO, a dog", r"a\1 in TOKYO, a a\1"]}


def test_each_batch_draws_its_words_by_index() -> None:
    pictures = items([(32, 32)] * 3)
    priors = {p.name: ["a dog", "a cat"] for p in pictures}
    made = [Dataset(pictures, latents(pictures), batch_size=2, seed=0, priors=priors) for _ in range(2)]
    drawn = [made[0].micro(i).prior for i in range(40)]
    assert drawn == [made[1].micro(i).prior for i in range(40)]
    counts = Counter(word for batch in drawn for word in batch)
    assert counts["a dog"] + counts["a cat"] == 80
    assert 20 <= counts["a dog"] <= 60
    plain = Dataset(pictures, latents(pictures), batch_size=2, seed=0)
    assert plain.micro(3).prior == ()
    assert plain.micro(3).captions == made[0].micro(3).captions


def trained(base: Path, pictures: Path, out: Path, weight: float) -> tuple[float, float]:
    """How far the prediction for a class word, and that for the trigger, moved from the base's."""
    tree = {
        "data": {"source": str(pictures), "class_words": ["dog"], "caption_dropout": 0.0},
        "model": {"base": str(base)},
        "adapter": {"rank": 4, "targets": "attention+ff"},
        "text": {"tokens": 1},
        "objective": {"prior_weight": weight},
        "optim": {"adapter": {"lr": 0.01}},
        "sample": {"strengths": []},
        "hooks": {"tensorboard": False},
        "runtime": {"out": str(out), "name": f"weight-{weight:g}", "steps": 12, "batch_size": 2, "device": "cpu"},
    }
    with run.opened(cli.validate(tree)) as session:
        steps = list(session.steps())
        assert ("prior" in steps[0].terms) == (weight > 0)
        family, adapters = session.run.family, session.run.adapters
        frozen = assembly.frozen(family, adapters)
        xt, t = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.full((4,), 500)
        moved = []
        for word in ("dog", "TOK"):
            cond = family.encode([f"a {word}"] * 4)
            with torch.no_grad():
                moved.append(float((family.predict(xt, t, cond) - frozen(xt, t, cond)).square().mean()))
    return moved[0], moved[1]


def test_keeping_the_prior_holds_the_class_word_and_not_the_trigger(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    free, kept = (trained(tiny_base, tiny_pictures, tmp_path, weight) for weight in (0.0, 20.0))
    assert free[0] > 0
    assert kept[0] < 0.5 * free[0]
    assert kept[1] / kept[0] > free[1] / free[0]
