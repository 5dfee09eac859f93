"""Events: when each comes, what an answer changes, and who is named when one fails. On real small modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import equal, make_run, tensors
from test_loop import Ranked
from torch import Tensor

from trainer.checkpoint import load, save
from trainer.events import HookError, hears
from trainer.hooks import Hook
from trainer.listeners import Listeners
from trainer.loop import Run, train
from trainer.types import Batch, Loss, Predict, Samples, Step


class Mine(Hook):
    """A hook of one's own without a run directory."""

    everywhere = True

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    @property
    def name(self) -> str:
        return type(self).__name__


class All(Mine):
    """Hears everything and changes nothing."""


def _heard(name: str) -> Callable[..., None]:
    def hear(self: All, *what: Any) -> None:
        self.events.append((name, what[-1]))

    return hear


for _name in [name for name in vars(Hook) if name.startswith("on_") or name == "wants_stop"]:
    setattr(All, _name, _heard(_name))


IN_MICRO = ["on_samples", "on_batch", "on_timesteps", "on_noise", "on_prediction", "on_loss"]
IN_UPDATE = ["on_gradients", "on_rates", "on_before_update", "on_after_update", "on_step", "wants_stop"]


def test_events_come_in_their_order_and_listening_changes_nothing() -> None:
    plain, heard, hook = make_run(steps=2, accumulate=2), None, All()
    list(train(plain))
    heard = make_run(steps=2, accumulate=2, hooks=[hook])
    list(train(heard))
    assert equal(tensors(plain), tensors(heard))
    once = IN_MICRO * 2 + IN_UPDATE
    assert [name for name, _ in hook.events] == ["on_start", *once, *once, "on_end"]
    micros = [event for name, event in hook.events if name == "on_batch"]
    assert [(event.update, event.turn) for event in micros] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    chosen = next(event for name, event in hook.events if name == "on_samples")
    assert chosen.samples.names == heard.dataset.micro(0).names
    assert chosen.bucket == tuple(reversed(chosen.samples.latents.shape[-2:]))


def test_the_prediction_is_that_of_what_is_told_with_it() -> None:
    hook = All()
    run = make_run(steps=1, hooks=[hook])
    list(train(run))
    said = dict(hook.events)
    made, t, eps = said["on_prediction"], said["on_timesteps"].t, said["on_noise"].eps
    x0 = said["on_batch"].batch.latents
    torch.testing.assert_close(made.xt, run.family.path.noisy(x0, eps, t))
    torch.testing.assert_close(made.target, run.family.path.target_of(x0, eps, t))
    raw = ((made.pred - made.target) ** 2).mean()
    assert said["on_loss"].loss.terms["raw"].item() == pytest.approx(raw.item(), rel=1e-6)


def test_nobody_is_asked_when_nobody_listens() -> None:
    class Only(Mine):
        def on_step(self, run: Run, step: Step) -> None: ...

    seen: list[object] = []
    run = make_run(steps=1, hooks=[Only()])
    objective = run.objective

    def watching(predict: Predict, batch: Batch) -> Loss:
        seen.append(batch.probe)
        return objective(predict, batch)

    run.objective = watching
    list(train(run))
    assert seen == [None]
    assert [name for name in vars(Hook) if name.startswith("on_") and hears(Only(), name)] == ["on_step"]


class Zero(Mine):
    def on_noise(self, run: Run, event: Any) -> Tensor:
        return torch.zeros_like(event.eps)


class Early(Mine):
    def on_timesteps(self, run: Run, event: Any) -> Tensor:
        return torch.full_like(event.t, 7)


class Blank(Mine):
    def on_samples(self, run: Run, event: Any) -> Samples:
        return replace(event.samples, latents=torch.zeros_like(event.samples.latents))


class Bright(Mine):
    def on_batch(self, run: Run, event: Any) -> Batch:
        return replace(event.batch, latents=event.batch.latents + 1)


class Perfect(Mine):
    def on_prediction(self, run: Run, event: Any) -> Tensor:
        return event.pred * 0 + event.target


class Double(Mine):
    def on_loss(self, run: Run, event: Any) -> Loss:
        return Loss(2 * event.loss.total, {**event.loss.terms, "single": event.loss.total.detach()})


class Slow(Mine):
    def on_rates(self, run: Run, event: Any) -> Mapping[str, float]:
        return {**event.lr, "rows": 0.0}


def test_an_answer_takes_the_place_of_what_was_told() -> None:
    def told(*hooks: Mine) -> tuple[dict[str, Any], Step, dict[str, Tensor], dict[str, Tensor]]:
        last = All()
        run = make_run(steps=1, hooks=[*hooks, last])
        before = tensors(run)
        (step,) = train(run)
        return dict(last.events), step, before, tensors(run)

    plain, plain_step, _, _ = told()
    assert not told(Zero())[0]["on_noise"].eps.any()
    seen = told(Zero(), Early())[0]
    level = (torch.full((2,), 7), seen["on_batch"].batch.latents)
    torch.testing.assert_close(
        seen["on_prediction"].xt, make_run().family.path.noisy(level[1], torch.zeros_like(level[1]), level[0])
    )
    assert not told(Blank())[0]["on_batch"].batch.latents.any()
    torch.testing.assert_close(
        told(Bright())[0]["on_prediction"].target,
        make_run().family.path.target_of(
            plain["on_batch"].batch.latents + 1, plain["on_noise"].eps, plain["on_timesteps"].t
        ),
    )
    assert told(Perfect())[1].terms["raw"] == 0
    doubled = told(Double())[1]
    assert doubled.terms["single"] == pytest.approx(plain_step.terms["raw"])
    assert doubled.loss - doubled.terms["penalty"] == pytest.approx(2 * plain_step.terms["raw"])
    _, slow, before, after = told(Slow())
    assert slow.lr["rows"] == 0
    assert torch.equal(before["rows"], after["rows"])
    assert not torch.equal(before["up.weight"], after["up.weight"])


def test_hooks_answer_one_after_another_in_the_order_they_are_in() -> None:
    def found(*hooks: Mine) -> Tensor:
        last = All()
        list(train(make_run(steps=1, hooks=[*hooks, last])))
        return dict(last.events)["on_noise"].eps

    class Plus(Mine):
        def on_noise(self, run: Run, event: Any) -> Tensor:
            return event.eps + 1

    assert found(Zero(), Plus()).unique().tolist() == [1.0]
    assert found(Plus(), Zero()).unique().tolist() == [0.0]


class Broken(Mine):
    def on_noise(self, run: Run, event: Any) -> Tensor:
        raise KeyError("no such thing")


class Shape(Mine):
    def on_noise(self, run: Run, event: Any) -> Tensor:
        return event.eps[:1]


class Kind(Mine):
    def on_batch(self, run: Run, event: Any) -> Any:
        return event.batch.latents


class Word(Mine):
    def on_before_update(self, run: Run, event: Any) -> Any:
        return "more"


class Rate(Mine):
    def on_rates(self, run: Run, event: Any) -> Mapping[str, float]:
        return {"adapter": -1.0, "rows": 0.1}


class Again(Mine):
    def on_gradients(self, run: Run, event: Any) -> Mapping[str, float]:
        return {"figure": 1.0}


class More(Again): ...


@pytest.mark.parametrize(
    ("hooks", "sentence"),
    [
        ([Broken()], r"hook Broken failed at on_noise: KeyError: 'no such thing'"),
        ([Shape()], r"hook Shape failed at on_noise: .*tensor of \[1, .* in place of \[2, "),
        ([Kind()], "hook Kind failed at on_batch: it returned a Tensor in place of a Batch"),
        ([Word()], "hook Word failed at on_before_update: .* return None"),
        ([Rate()], "hook Rate failed at on_rates: .*'adapter': -1.0"),
        ([Again(), More()], "hook More failed at on_gradients: it adds figure .* another hook"),
    ],
)
def test_a_failing_hook_fails_the_run_and_is_named(hooks: list[Mine], sentence: str) -> None:
    run = make_run(steps=1, hooks=hooks)
    before = tensors(run)
    with pytest.raises(HookError, match=sentence) as caught:
        list(train(run))
    assert isinstance(caught.value.__cause__, KeyError if isinstance(hooks[0], Broken) else TypeError | ValueError)
    assert equal(before, tensors(run))


def test_an_error_that_speaks_for_itself_passes_as_it_is() -> None:
    class Polite(Broken):
        own_errors = (KeyError,)

    with pytest.raises(KeyError):
        list(train(make_run(steps=1, hooks=[Polite()])))


def test_what_changes_one_process_alone_is_refused() -> None:
    class Alone(Zero):
        everywhere = False

    run = make_run(steps=1, hooks=[Alone()])
    run.engine = Ranked(0)
    with pytest.raises(HookError, match=r"Alone failed at on_noise.* 2 processes alone; set everywhere"):
        list(train(run))
    run = make_run(steps=1, hooks=[Zero()])
    run.engine = Ranked(0)
    assert len(list(train(run))) == 1


class Third(Mine):
    def wants_stop(self, run: Run, step: Step) -> str | None:
        return "three are enough" if step.step == 3 else None


def test_a_hook_may_end_the_run_and_the_end_is_that_of_any_run(caplog: pytest.LogCaptureFixture) -> None:
    hook = All()
    run = make_run(steps=6, hooks=[Third(), hook])
    assert [step.step for step in train(run)] == [1, 2, 3]
    (_, stopped), (last, _) = hook.events[-2:]
    assert (stopped.step, stopped.by, stopped.reason, last) == (3, "Third", "three are enough", "on_end")
    assert "Third ended the run after step 3 of 6: three are enough" in caplog.text
    short = make_run(steps=6)
    assert len([next(steps) for steps in [train(short)] for _ in range(3)]) == 3
    assert equal(tensors(run), tensors(short))


def test_a_wish_of_one_process_ends_all(caplog: pytest.LogCaptureFixture) -> None:
    class Other(Ranked):
        """The other process wishes to stop after the second update."""

        def gathered(self, rows: Any) -> Any:
            if rows == [[]]:
                self.asked = getattr(self, "asked", 0) + 1
                return [[], [["Far", "there"]] if self.asked == 2 else []]
            return super().gathered(rows)

    run = make_run(steps=6, hooks=[All()])
    run.engine = Other(0)
    assert [step.step for step in train(run)] == [1, 2]
    assert "Far ended the run after step 2 of 6: there" in caplog.text


def test_a_hooks_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    class Counts(Mine):
        def __init__(self) -> None:
            super().__init__()
            self.count = torch.zeros(1)

        def on_after_update(self, run: Run, event: Any) -> None:
            self.count += event.update + 1

        def state_dict(self) -> Mapping[str, Tensor]:
            return {"count": self.count}

        def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
            self.count = state["count"]

    first, second, silent = Counts(), Counts(), All()
    run = make_run(steps=3, hooks=[first, silent])
    list(train(run))
    save(tmp_path / "c", 3, run.adapters, run.optimizers, hooks=[first, silent])
    assert {path.name for path in (tmp_path / "c").glob("hook_*")} == {"hook_Counts.safetensors"}
    again = make_run(steps=3)
    load(tmp_path / "c", again.adapters, again.optimizers, hooks=[second, silent])
    assert second.count.item() == 6


def test_before_a_run_hooks_are_told_without_one() -> None:
    hook = All()
    Listeners(None, [hook]).say("on_model", "the base")
    assert hook.events == [("on_model", "the base")]
