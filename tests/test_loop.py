"""The loop on real small modules: what each update does, and that a resumed run is the same run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CPU, equal, make_run, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.checkpoint import load, save
from trainer.events import Gradients
from trainer.loop import NonFiniteLoss, Run, train
from trainer.seed import derive
from trainer.types import Batch, Cond, Loss, Predict, Samples, Step


class Watch:
    """Records the events of a run, and what was true at each."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.steps: list[Step] = []

    def on_start(self, run: Run) -> None:
        self.events.append("start")

    def on_gradients(self, run: Run, event: Gradients) -> Mapping[str, float]:
        self.events.append(f"gradients {event.update}")
        named = [pair for component in run.components.values() for pair in component]
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        return {"watched": float(event.update)}

    def on_step(self, run: Run, step: Step) -> None:
        self.events.append(f"step {step.step}")
        assert all(p.grad is None for component in run.components.values() for _, p in component)
        self.steps.append(step)

    def on_end(self, run: Run) -> None:
        self.events.append("end")


RESUMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "dropout": {"dropout": 0.4},
    "prodigy": {"batch_size": 1, "adapter": {"name": "prodigy", "lr": 1.0}, "rows": {"name": "prodigy", "lr": 1.0}},
    "pivotal": {
        "accumulate": 2,
        "dropout": 0.3,
        "adapter": {"name": "prodigy", "lr": 1.0, "curve": "pivot_adapter", "weight_decay": 0.01},
        "rows": {"lr": 0.05, "curve": "pivot_rows", "betas": (0.8, 0.9)},
        "objective": {"min_snr_gamma": 5.0, "offset_noise": 0.1},
    },
}


@pytest.mark.parametrize("done", [1, 15])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_same_run_to_the_last_bit(name: str, done: int, tmp_path: Path) -> None:
    whole = make_run(steps=16, **RESUMED[name])
    expected = [step.loss for step in train(whole)]

    first = make_run(steps=16, **RESUMED[name])
    losses = [step.loss for step in islice(train(first), done)]
    save(tmp_path / "c", done, first.adapters, first.optimizers)
    second = make_run(steps=16, **RESUMED[name])
    start = load(tmp_path / "c", second.adapters, second.optimizers)
    losses += [step.loss for step in train(second, start)]

    assert losses == expected
    assert equal(tensors(second), tensors(whole))
    assert not equal(tensors(second), tensors(make_run())), "nothing was trained"


def test_dropout_is_on_and_its_draws_depend_on_the_seed() -> None:
    trained = {}
    for name, options in {"off": {}, "on": {"dropout": 0.4}, "again": {"dropout": 0.4}}.items():
        run = make_run(**options)
        list(train(run))
        trained[name] = tensors(run)
    assert equal(trained["on"], trained["again"])
    assert not equal(trained["on"], trained["off"])


def test_another_seed_is_another_run() -> None:
    a, b = make_run(seed=1), make_run(seed=2)
    list(train(a))
    list(train(b))
    assert not equal(tensors(a), tensors(b))


def test_events_come_in_order_and_steps_tell_what_happened() -> None:
    watch = Watch()
    run = make_run(steps=2, accumulate=3, hooks=[watch], adapter={"lr": 0.5, "curve": "linear"}, rows={"lr": 0.25})
    steps = list(train(run))
    assert watch.events == ["start", "gradients 0", "step 1", "gradients 1", "step 2", "end"]
    assert [step.step for step in steps] == [1, 2]
    assert [step.images for step in steps] == [6, 6]
    assert [step.lr for step in steps] == [{"adapter": 0.5, "rows": 0.25}, {"adapter": 0.25, "rows": 0.25}]
    assert [step.extra for step in steps] == [{"watched": 0.0}, {"watched": 1.0}]
    for step in steps:
        assert step.seconds > 0
        assert set(step.terms) == {"raw", "weighted", "penalty"}
        assert step.loss == pytest.approx(step.terms["raw"] + step.terms["penalty"])
        assert step.terms["penalty"] > 0
        assert set(step.grad_norm) == {"adapter", "rows"}


def test_a_resumed_run_of_which_nothing_is_left_only_ends() -> None:
    watch = Watch()
    assert list(train(make_run(steps=3, hooks=[watch]), start=3)) == []
    assert watch.events == ["start", "end"]


def test_accumulated_gradients_are_the_mean_over_the_micros() -> None:
    watch = Watch()
    next(train(make_run(accumulate=2, hooks=[watch], caption_dropout=0.0)))

    run = make_run(accumulate=2, caption_dropout=0.0)
    parameters = [p for component in run.components.values() for _, p in component]
    names = [name for component in run.components.values() for name, _ in component]
    total = [torch.zeros_like(p) for p in parameters]
    for micro in range(2):
        samples = run.dataset.micro(micro)
        generator = torch.Generator().manual_seed(derive(run.seed, "micro", 0, micro, 0))
        batch = Batch(samples.latents, run.encode(samples.captions), samples.names, generator)
        loss = run.objective(run.family.predict, batch).total + 0.01 * (run.adapters[1].rows ** 2).mean()  # type: ignore
        total = [a + b for a, b in zip(total, torch.autograd.grad(loss, parameters), strict=True)]
    assert set(watch.gradients[0]) == set(names)
    for name, gradient in zip(names, total, strict=True):
        torch.testing.assert_close(watch.gradients[0][name], gradient / 2)


class Ranked(CPU):
    """One of two processes, of which the other has the same losses."""

    processes = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def gathered(self, rows: Sequence[Any]) -> Sequence[Any]:
        return [row for row in rows for _ in range(2)]


def test_every_micro_of_every_process_draws_its_own_numbers_and_the_same_ones_again() -> None:
    def draws(rank: int) -> list[tuple[float, float]]:
        run = make_run(steps=3, accumulate=2)
        run.engine, objective = Ranked(rank), run.objective
        drawn: list[tuple[float, float]] = []

        def watching(predict: Predict, batch: Batch) -> Loss:
            copy = torch.Generator().manual_seed(0)
            copy.set_state(batch.generator.get_state())
            drawn.append((torch.rand(1).item(), torch.rand(1, generator=copy).item()))
            return objective(predict, batch)

        run.objective = watching
        list(train(run))
        return drawn

    first, second = draws(0), draws(1)
    for source in (0, 1):  # the global generator, then the batch's own
        assert len({drawn[source] for drawn in first + second}) == 3 * 2 * 2
    assert draws(0) == first


def test_each_component_is_clipped_by_its_own_norm() -> None:
    free, tight = Watch(), Watch()
    run = make_run(steps=1, hooks=[free], max_grad_norm=1e9)
    step = next(train(run))
    by_hand = {
        "adapter": math.sqrt(sum(float((free.gradients[0][n] ** 2).sum()) for n in ("down.weight", "up.weight"))),
        "rows": float(free.gradients[0]["rows"].norm()),
    }
    assert step.grad_norm == pytest.approx(by_hand)

    clipped = make_run(steps=1, hooks=[tight], max_grad_norm=1e-4)
    seen: dict[str, float] = {}
    for component, optimizer in clipped.optimizers.items():

        def remember(opt: Any, *_: Any, component: str = component) -> None:
            seen[component] = math.sqrt(sum(float((p.grad**2).sum()) for p in opt.param_groups[0]["params"]))

        optimizer.register_step_pre_hook(remember)
    step = next(train(clipped))
    assert step.grad_norm == pytest.approx(by_hand), "norms are reported as they were before clipping"
    assert seen == pytest.approx({"adapter": 1e-4, "rows": 1e-4}, rel=1e-2)


def test_rows_stop_moving_past_the_pivot_and_the_adapter_goes_on() -> None:
    run = make_run(steps=10, rows={"curve": "pivot_rows", "lr": 0.1, "weight_decay": 0.1})
    states = [tensors(run)]
    for _ in train(run):
        states.append(tensors(run))
    moved = [not torch.equal(a["rows"], b["rows"]) for a, b in pairwise(states)]
    assert moved == [True] * 8 + [False] * 2  # progress 0.0 .. 0.7, then 0.8 and 0.9
    assert not torch.equal(states[-1]["up.weight"], states[-2]["up.weight"])


def test_the_rate_logged_for_prodigy_is_the_one_in_force() -> None:
    run = make_run(steps=12, adapter={"name": "prodigy", "lr": 1.0})
    last = list(train(run))[-1]
    assert last.lr["adapter"] > 1e-6
    assert last.lr["adapter"] == run.optimizers["adapter"].param_groups[0]["d"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_update_reads_numbers_from_the_device_twice(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Single(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                read.append("one")
            return func(*args, **(kwargs or {}))

    read: list[str] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: read.append("list") or tolist(self))
    run = make_run(accumulate=accumulate, objective={"min_snr_gamma": 5.0})
    samples = [run.dataset.micro(index) for index in range(2 * accumulate)]  # which are drawn in RAM
    run.dataset.micro = samples.__getitem__  # type: ignore[method-assign]
    steps = train(run)
    next(steps)  # optimizers make their state
    read.clear()
    with Single():
        next(steps)
    assert read == ["list", "list"], "the losses of all micros at once, and then the norms of the gradients"


def test_terms_of_any_name_stand_beside_the_loss() -> None:
    run = make_run(steps=1, accumulate=2)
    objective = run.objective

    def named(predict: Predict, batch: Batch) -> Loss:
        return replace(objective(predict, batch), terms={"loss": torch.tensor(7.0)})

    run.objective = named
    step = next(train(run))
    assert step.terms["loss"] == 7.0
    assert 0 < step.loss < 7


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_pictures() -> None:
    run = make_run(steps=4)
    predict, calls = run.family.predict, 0

    def poisoned(xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        nonlocal calls
        calls += 1
        return predict(xt, t, cond) * (math.nan if calls == 3 else 1.0)

    run.family.predict = poisoned  # type: ignore[method-assign]
    steps = train(run)
    next(steps), next(steps)
    before = tensors(run)
    with pytest.raises(NonFiniteLoss, match="the loss is not finite at step 3") as caught:
        next(steps)
    assert caught.value.step == 3
    assert caught.value.names == run.dataset.micro(2).names
    assert all(name in str(caught.value) for name in caught.value.names)
    assert equal(tensors(run), before)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_does_harm() -> None:
    class Overflowing(CPU):
        def backward(self, loss: Tensor) -> None:
            (loss * math.inf).backward()

    run = make_run()
    run.engine = Overflowing()
    before = tensors(run)
    with pytest.raises(NonFiniteLoss, match="gradient of adapter is not finite at step 1"):
        next(train(run))
    assert equal(tensors(run), before)


def test_an_update_whose_gradients_overflow_is_left_out_where_the_engine_can_go_on() -> None:
    class Once(CPU):
        """Overflows in the first of the updates, and adapts."""

        def backward(self, loss: Tensor) -> None:
            (loss if told else loss * math.inf).backward()

        def settled(self, finite: bool) -> bool:
            told.append(finite)
            return True

    told: list[bool] = []

    run = make_run(steps=3)
    run.engine = Once()
    before = tensors(run)
    steps = train(run)
    next(steps)
    assert equal(tensors(run), before)
    assert all(p.grad is None for named in run.components.values() for _, p in named)
    next(steps)
    assert not equal(tensors(run), before)
    assert [step.step for step in steps] == [3]
    assert told == [False, True, True]


def test_processes_share_the_pictures_out_between_them() -> None:
    seen: list[list[int]] = []
    for rank in (0, 1):
        run = make_run(steps=1, accumulate=2)
        run.engine, micro = Ranked(rank), run.dataset.micro
        asked: list[int] = []

        def remember(index: int, asked: list[int] = asked, micro: Callable[[int], Samples] = micro) -> Samples:
            asked.append(index)
            return micro(index)

        run.dataset.micro = remember  # type: ignore[method-assign]
        assert next(train(run)).images == 8
        seen.append(asked)
    assert seen == [[0, 2], [1, 3]]


def test_the_sizes_of_the_pictures_go_with_their_captions_and_with_the_prior() -> None:
    run = make_run(steps=2)
    seen: list[Batch] = []

    class WithPrior:
        def micro(self, index: int) -> Samples:
            samples = run_dataset.micro(index)
            return replace(samples, prior=samples.captions)

    def objective(predict: Predict, batch: Batch) -> Loss:
        seen.append(batch)
        return original(predict, batch)

    run_dataset, original = run.dataset, run.objective
    run.dataset, run.objective = WithPrior(), objective
    list(train(run))
    for index, batch in enumerate(seen):
        sizes = run_dataset.micro(index).sizes
        assert sizes is not None
        assert sizes.shape == (2, 6)
        assert batch.prior is not None
        for cond in (batch.cond, batch.prior):
            assert cond.sizes is not None
            assert torch.equal(cond.sizes, sizes)
