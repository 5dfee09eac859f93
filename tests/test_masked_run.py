"""Masks in whole runs: what is looked at, what the base keeps outside, and masks that would do nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from trainer import cli, run
from trainer.events import BatchMade
from trainer.hooks import Context, Hook
from trainer.loop import Run, train
from trainer.types import BaseModelError, Batch


@pytest.fixture
def masked(tiny_pictures: Path) -> Path:
    """Four of the five pictures get a mask of their ellipse."""
    for picture in sorted(tiny_pictures.glob("*.png"))[:4]:
        mask = Image.new("L", Image.open(picture).size, 0)
        ImageDraw.Draw(mask).ellipse((5, 6, 30, 30), fill=255)
        mask.save(picture.with_suffix(".mask.png"))
    return tiny_pictures


def tree(base: Path, pictures: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": {"source": str(pictures), "masks": True, **sections.pop("data", {})},
        "model": {"base": str(base), **sections.pop("model", {})},
        "sample": {"strengths": []},
        "hooks": {"tensorboard": False},
        "runtime": {"out": str(out), "name": "run", "steps": 3, "batch_size": 5, "device": "cpu"},
        **sections,
    }


class Batches(Hook):
    """Keeps every batch."""

    def __init__(self, session: run.Session) -> None:
        super().__init__(Context(session.dir, session.args))
        self.kept: list[Batch] = []

    def on_batch(self, run: Run, event: BatchMade) -> None:
        self.kept.append(event.batch)


@pytest.mark.parametrize(("tokens", "most"), [(0, 0.9), (2, 0.99)])  # rows move little of what a random base does
def test_what_is_looked_at_for_the_trigger_goes_into_the_mask(
    tiny_base: Path, masked: Path, tmp_path: Path, tokens: int, most: float, caplog: pytest.LogCaptureFixture
) -> None:
    args = tree(
        tiny_base,
        masked,
        tmp_path / "out",
        data={"caption_dropout": 0.0},
        text={"tokens": tokens},
        adapter={"kind": "none"} if tokens else {"rank": 4},
        objective={"attention": {"weight": 50.0, "cell": 2}},
        optim={"adapter": {"lr": 0.02}, "rows": {"lr": 0.2}},
    )
    args["runtime"]["steps"] = 12
    with caplog.at_level(logging.WARNING), run.opened(cli.validate(args)) as session:
        session.run.hooks = []
        before = _astray(session)
        steps = list(train(session.run))
        assert sum(_astray(session)) < most * sum(before)
    for step in steps:  # the fifth picture is in a bucket of its own
        assert step.terms["attention_weighted"] == pytest.approx(50 * step.terms["attention"])
    assert max(step.terms["attention"] for step in steps) > 0.01
    assert "dog_04.png: no mask was found" in caplog.text
    assert "objective.attention does nothing for them: dog_04" in caplog.text


def _astray(session: run.Session) -> list[float]:
    """Share of what is looked at for the trigger that is outside of a picture's mask, over the noise levels."""
    family = session.run.family
    mask = session.run.dataset.micro(0).mask
    assert mask is not None
    caption, found = ["a red TOK on a white background"], []
    inside = torch.nn.functional.avg_pool2d(mask[mask.flatten(1).mean(1) < 1][:1], 2)[0, 0]
    for seed, level in enumerate((100, 400, 700)):
        xt = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), family.attention_maps(family.token_places(caption, ["TOK"]), 2) as looks:
            family.predict(xt, torch.tensor([level]), family.encode(caption))
            maps = looks()[0]
        found.append(float(1 - (maps * inside).sum() / maps.sum()))
    return found


def test_where_nobody_asks_nothing_is_watched_and_no_trigger_is_looked_for(
    tiny_base: Path, masked: Path, tmp_path: Path
) -> None:
    with run.opened(cli.validate(tree(tiny_base, masked, tmp_path / "out"))) as session:
        batches = Batches(session)
        session.run.hooks = [batches]
        next(train(session.run))
        assert (session.run.watch, session.run.encode_base) == (None, None)
        assert session.run.dataset.micro(0).triggers == ()
        assert batches.kept[0].watch is None
        assert batches.kept[0].base is None


def test_a_dropped_caption_and_a_picture_without_a_mask_contribute_nothing(
    tiny_base: Path, masked: Path, tmp_path: Path
) -> None:
    from trainer.objectives.denoise import astray

    args = tree(
        tiny_base,
        masked,
        tmp_path / "out",
        data={"caption_dropout": 0.5},
        objective={"attention": {"weight": 1.0, "cell": 2}},
    )
    with run.opened(cli.validate(args)) as session:
        family, dropped, whole = session.run.family, 0, 0
        for index in range(6):
            samples = session.run.dataset.micro(index)
            assert samples.mask is not None
            assert session.run.watch is not None
            with torch.no_grad(), session.run.watch(samples)() as looks:
                count = len(samples.captions)
                family.predict(samples.latents, torch.full((count,), 500), family.encode(samples.captions))
            for caption, name, part in zip(samples.captions, samples.names, astray(looks(), samples.mask), strict=True):
                dropped, whole = dropped + (not caption), whole + (name == "dog_04" and bool(caption))
                assert (
                    float(part) == pytest.approx(0, abs=1e-9) if name == "dog_04" or not caption else float(part) > 0.01
                )
        assert dropped
        assert whole


def test_a_resolution_that_the_base_lacks_is_refused(tiny_base: Path, masked: Path, tmp_path: Path) -> None:
    args = tree(tiny_base, masked, tmp_path / "out", objective={"attention": {"weight": 1.0}})
    opened = run.opened(cli.validate(args))
    with pytest.raises(BaseModelError, match=r"no cross-attention over cells of 4 x 4.*cells of 2$"), opened:
        pass
    assert not (tmp_path / "out" / "run").exists()


def test_captions_that_end_before_the_trigger_leave_nothing_to_watch(
    tiny_base: Path, masked: Path, tmp_path: Path
) -> None:
    for text in masked.glob("*.txt"):
        text.write_text("a red star on a white background " * 8 + "TOK")
    args = tree(tiny_base, masked, tmp_path / "out", objective={"attention": {"weight": 1.0, "cell": 2}})
    opened = run.opened(cli.validate(args))
    with pytest.raises(run.RunError, match=r"no picture has both .* \(4 have a mask, 0 the trigger, of 5\)"), opened:
        pass


@pytest.mark.parametrize("shade", [0, 255])
def test_masks_that_show_no_part_are_an_error(tiny_base: Path, tiny_pictures: Path, tmp_path: Path, shade: int) -> None:
    for picture in sorted(tiny_pictures.glob("*.png"))[:4]:
        Image.new("L", Image.open(picture).size, shade).save(picture.with_suffix(".mask.png"))
    args = tree(tiny_base, tiny_pictures, tmp_path / "out", objective={"mask_prior": 1.0})
    opened = run.opened(cli.validate(args))
    with pytest.raises(run.RunError, match=r"would count as a whole: 1 of 5 have no mask, and .* all"), opened:
        pass
    assert not (tmp_path / "out" / "run").exists()


# --- what the base keeps, while text is trained


def moved_since(session: run.Session, captions: list[str]) -> tuple[Tensor, Tensor]:
    """What the captions are to the base, and to the run."""
    assert session.run.encode_base is not None
    return session.run.encode_base(captions).hidden, session.run.encode(captions).hidden.detach()


@pytest.mark.parametrize("kind", ["mask_prior", "prior_weight"])
def test_the_base_reads_captions_as_before_while_text_encoders_are_trained(
    tiny_base: Path, masked: Path, tmp_path: Path, kind: str
) -> None:
    args = tree(
        tiny_base,
        masked,
        tmp_path / "out",
        data={"class_words": ["star"], "caption_dropout": 0.0},
        adapter={"rank": 4, "text": {"train": True, "targets": "all"}},
        objective={kind: 1.0},
        optim={"text": {"lr": 0.01}},
    )
    with run.opened(cli.validate(args)) as session:
        batches = Batches(session)
        session.run.hooks = [batches]
        captions = ["a red TOK", "a star"]
        before = session.run.family.encode(captions).hidden.detach()
        list(train(session.run))
        own, trained = moved_since(session, captions)
        assert torch.equal(own, before)
        assert (trained - before).abs().max() > 0.01
        last = batches.kept[-1]
        assert last.base is not None
        asked = last.prior if kind == "prior_weight" else last.cond
        assert asked is not None
        assert asked.sizes is not None
        assert torch.equal(asked.sizes, last.base.sizes)
        assert not last.base.hidden.requires_grad
        assert (asked.hidden - last.base.hidden).abs().max() > 1e-3


def test_rows_alone_are_held_outside_the_mask_by_what_the_trigger_is_to_the_base(
    tiny_base: Path, masked: Path, tmp_path: Path
) -> None:
    args = tree(
        tiny_base,
        masked,
        tmp_path / "out",
        adapter={"kind": "none"},
        text={"tokens": 2},
        objective={"mask_prior": 1.0},
        data={"caption_dropout": 0.0},
    )
    with run.opened(cli.validate(args)) as session:
        family = session.run.family
        session.run.hooks = []
        assert max(step.terms["outside"] for step in train(session.run)) > 0
        own, rows = moved_since(session, ["a red TOK"])
    assert not torch.equal(own, rows)
    assert torch.equal(own, family.encode(["a red TOK"]).hidden)
