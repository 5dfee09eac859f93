"""The hooks that ship: their figures against references, what they move, what a resumed run makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from small import SmallFamily, equal, make_run, tensors
from torch import Tensor

from trainer import cli, run
from trainer.args import (
    ActivationsArgs,
    CollapseArgs,
    EmaArgs,
    GradStatsArgs,
    HooksArgs,
    NoiseJitterArgs,
    TeacherArgs,
)
from trainer.checkpoint import load, save
from trainer.events import AfterUpdate, Attached, CheckpointSaved, Gradients, ModelLoaded, NoiseDrawn, RowDrawn
from trainer.hooks import Context, Hook, Purpose, compose
from trainer.hooks.activations import Activations
from trainer.hooks.collapse import Collapse, look
from trainer.hooks.ema import EMA
from trainer.hooks.grad_stats import GradStats, block_of
from trainer.hooks.layer import LayerHook, PatternError, matching
from trainer.hooks.noise_jitter import NoiseJitter
from trainer.hooks.teacher import Teacher
from trainer.loop import Run, train
from trainer.path import NoisePath
from trainer.registry import PartError
from trainer.report import page
from trainer.rundir import RunDir
from trainer.types import Step


def context(start: int = 0, **sections: object) -> Context:
    tree = {"data": {"source": "x"}, "model": {"family": "sd15"}, **sections}
    return Context(RunDir(Path("nowhere")), cli.validate(tree), start)


class Trace(Hook):
    """Copies of the parameters after each update, and the noise that the objective was given."""

    everywhere = True

    def __init__(self) -> None:
        super().__init__(context())
        self.parameters: list[dict[str, Tensor]] = []
        self.noise: list[Tensor] = []

    def on_after_update(self, run: Run, event: AfterUpdate) -> None:
        self.parameters.append(tensors(run))

    def on_noise(self, run: Run, event: NoiseDrawn) -> None:
        self.noise.append(event.eps.clone())


# --- ema


def test_the_average_is_that_of_diffusers() -> None:
    trace, ema = Trace(), EMA(context(), EmaArgs(decay=0.5))
    start = make_run()
    run = make_run(steps=12, hooks=[trace, ema])
    list(train(run))
    reference = EMAModel([p for named in start.components.values() for _, p in named], decay=0.5)
    for after in trace.parameters:
        reference.step([torch.nn.Parameter(p) for p in after.values()])  # it copies what is not trained
    for mine, theirs in zip(ema.state_dict().values(), reference.shadow_params, strict=True):
        torch.testing.assert_close(mine, theirs.data)
    assert [ema.decay(update) for update in (0, 1, 30)] == [0.0, 2 / 11, 0.5]


def test_without_warmup_the_start_is_part_of_the_average() -> None:
    trace, ema = Trace(), EMA(context(), EmaArgs(decay=0.9, warmup=0))
    run = make_run(steps=2, hooks=[trace, ema])
    before = tensors(run)["rows"]
    list(train(run))
    first, second = (after["rows"] for after in trace.parameters)
    torch.testing.assert_close(ema.state_dict()["rows/rows"], 0.81 * before + 0.09 * first + 0.1 * second)


def test_the_average_is_shown_where_it_should_be_and_training_does_not_notice() -> None:
    ema = EMA(context(), EmaArgs(decay=0.9, export=False))
    run, plain = make_run(steps=4, hooks=[ema]), make_run(steps=4)
    for step in train(run):
        with ema.presented(run, "samples"):
            shown = tensors(run)
        for name, average in ema.state_dict().items():
            assert torch.equal(shown[name.split("/")[1]], average)
        with ema.presented(run, "export"):
            assert not equal(tensors(run), shown) or step.step == 1
    list(train(plain))
    assert equal(tensors(run), tensors(plain))


def test_a_resumed_average_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    def new(start: int) -> tuple[Run, EMA]:
        ema = EMA(context(start), EmaArgs(decay=0.9))
        return make_run(steps=6, hooks=[ema]), ema

    whole, expected = new(0)
    list(train(whole))
    first, _ = new(0)
    for step in train(first):
        if step.step == 2:
            break
    save(tmp_path / "c", 2, first.adapters, first.optimizers, hooks=first.hooks)  # type: ignore[arg-type]
    second, found = new(2)
    load(tmp_path / "c", second.adapters, second.optimizers, hooks=second.hooks)  # type: ignore[arg-type]
    list(train(second, 2))
    assert equal(dict(found.state_dict()), dict(expected.state_dict()))


# --- figures


def test_norms_are_by_block_and_a_dead_gradient_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Kill(Hook):
        def on_gradients(self, run: Run, event: Gradients) -> None:
            (rows,) = (parameter for _, parameter in run.components["rows"])
            assert rows.grad is not None
            rows.grad.zero_()

    by_hand: list[float] = []

    class ByHand(Hook):
        def on_gradients(self, run: Run, event: Gradients) -> None:
            (up,) = (p for name, p in run.components["adapter"] if name == "up.weight")
            assert up.grad is not None
            by_hand.append(math.sqrt(float((up.grad**2).sum())))

    stats = GradStats(context(), GradStatsArgs(every=2, dead_after=3))
    run = make_run(steps=5, hooks=[Kill(context()), ByHand(context()), stats])
    steps = list(train(run))
    assert [sorted(step.extra) for step in steps[:2]] == [
        ["grad/adapter/down", "grad/adapter/up", "grad/dead", "grad/rows/rows"],
        [],
    ]
    assert [step.extra["grad/adapter/up"] for step in steps[::2]] == pytest.approx(by_hand[::2])
    assert [step.extra["grad/dead"] for step in steps[::2]] == [0.0, 1.0, 1.0]
    said = [record.getMessage() for record in caplog.records if "no gradient" in record.getMessage()]
    assert said == ["no gradient for 3 updates: rows rows"], "down is silent at the first update alone"


def test_a_block_is_the_first_words_of_a_name() -> None:
    assert block_of("down_blocks.0.attentions.1.to_q.lora_A.weight") == "down_blocks.0"
    assert block_of("mid_block.attentions.0.to_q") == "mid_block"
    assert block_of("rows") == "rows"


def layers_of(run: Run) -> Attached:
    family: Any = SimpleNamespace(denoiser=run.family.denoiser, text_encoders={"words": run.family.words})  # type: ignore[attr-defined]
    return Attached(family, run.components)


def test_activations_are_those_of_the_layer() -> None:
    hook = Activations(context(), ActivationsArgs(layers=("denoiser.pict*",), every=2))
    run = make_run(steps=2, accumulate=2, hooks=[hook])
    hook.on_attached(layers_of(run))
    seen: list[Tensor] = []
    run.family.denoiser.picture.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))  # type: ignore
    first, second = train(run)
    assert first.extra == {}
    assert len(seen) == 4
    assert second.extra == pytest.approx(
        {
            "activation_mean/denoiser.picture": sum(out.mean().item() for out in seen) / 4,
            "activation_std/denoiser.picture": sum(out.std(correction=0).item() for out in seen) / 4,
            "activation_max/denoiser.picture": max(out.abs().max().item() for out in seen),
        },
        rel=1e-5,
    )
    hook.close()
    assert not any(
        (module._forward_hooks or module._forward_pre_hooks) and module is not run.family.denoiser.picture
        for module in run.family.denoiser.modules()
    )
    assert len(run.family.denoiser.picture._forward_hooks) == 1, "ours is gone, the test's own is left"


# --- layers


class Swap(LayerHook):
    """Keeps a layer's weight away from it, as one that lives on another device, and lends it for each pass."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(context(), "denoiser.out")
        self.weight, self.passes = weight, 0

    def before_forward(self, name: str, module: Any, inputs: tuple[Any, ...]) -> None:
        module.weight.data = self.weight

    def on_forward(self, name: str, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        self.passes += 1
        return 2 * output


class Backwards(LayerHook):
    def __init__(self, by: float) -> None:
        super().__init__(context(), "*.up", "words")
        self.by, self.heard = by, []  # type: ignore[var-annotated]

    def on_backward(self, name: str, module: Any, gradients: tuple[Any, ...], of_output: tuple[Any, ...]) -> Any:
        self.heard.append(name)
        return tuple(None if one is None else one * self.by for one in gradients)


def test_a_layer_can_be_lent_its_weight_and_its_output_changed() -> None:
    run = make_run()
    x, t, cond = torch.randn(2, 2, 4, 4), torch.tensor([1, 2]), run.family.encode(["a", "red"])
    expected = run.family.predict(x, t, cond)
    layer: Any = run.family.denoiser.out
    hook = Swap(layer.weight.data)
    layer.weight.data = torch.zeros(1)
    hook.on_attached(layers_of(run))
    torch.testing.assert_close(run.family.predict(x, t, cond), 2 * expected)
    hook.close()
    hook.close()
    torch.testing.assert_close(run.family.predict(x, t, cond), expected)
    assert hook.passes == 1


def test_gradients_that_pass_a_layer_can_be_seen_and_changed() -> None:
    moved: dict[float, dict[str, Tensor]] = {}
    for by in (1.0, 0.0):
        hook = Backwards(by)
        run = make_run(steps=2, hooks=[hook])
        hook.on_attached(layers_of(run))
        before = tensors(run)
        list(train(run))
        moved[by] = {name: after - before[name] for name, after in tensors(run).items()}
        assert set(hook.heard) == {"denoiser.extra.up", "words"} or set(hook.heard) == {"denoiser.extra.up"}
    assert moved[1.0]["down.weight"].any()
    assert not moved[0.0]["down.weight"].any(), "down learns through up alone"
    assert moved[0.0]["up.weight"].any()


def test_a_pattern_that_fits_nothing_names_what_is_near() -> None:
    family = layers_of(make_run()).family
    assert list(matching(family, ["denoiser.*", "words"])) == [
        "denoiser.picture",
        "denoiser.text",
        "denoiser.out",
        "denoiser.extra",
        "denoiser.extra.dropout",
        "denoiser.extra.down",
        "denoiser.extra.up",
        "words",
    ]
    for pattern, near in (("denoiser.pictur", "denoiser.picture"), ("*.dwon", "*.down"), ("Z", "names are such as")):
        with pytest.raises(PatternError, match="no layer's name fits") as caught:
            matching(family, [pattern])
        assert near in str(caught.value)


# --- noise, teacher


def test_jittered_noise_is_the_same_noise_scaled_for_each_picture(tmp_path: Path) -> None:
    def noise(*hooks: Hook) -> list[Tensor]:
        trace = Trace()
        list(train(make_run(steps=3, hooks=[*hooks, trace])))
        return trace.noise

    def jitter() -> NoiseJitter:
        return NoiseJitter(context(), NoiseJitterArgs(strength=0.3))

    plain, scaled = noise(), noise(jitter())
    factors = torch.stack([(b / a).flatten(1) for a, b in zip(plain, scaled, strict=True)])
    torch.testing.assert_close(factors.std(-1), torch.zeros(3, 2), atol=1e-4, rtol=0)
    drawn = factors.mean(-1)
    assert bool(((drawn > 0.7) & (drawn < 1.3)).all())
    assert drawn.flatten().unique().numel() == 6, "each picture of each update has its own"
    assert all(torch.equal(a, b) for a, b in zip(scaled, noise(jitter()), strict=True))


class Older(SmallFamily):
    """Another base of the family."""

    def __init__(self, path: NoisePath | None = None) -> None:
        super().__init__()
        for parameter in self.denoiser.parameters():
            parameter.data.mul_(0.5)
        self.path = path or self.path

    @classmethod
    def load(cls, args: Any, device: torch.device) -> Older:
        assert args.base == "older"
        return cls()


class Other(Older):
    @classmethod
    def load(cls, args: Any, device: torch.device) -> Older:
        return cls(NoisePath(torch.linspace(0.99, 0.01, 1000), "epsilon"))


def teaching(kind: type, weight: float) -> Teacher:
    model = {"family": f"test_shipped_hooks:{kind.__name__}"}
    return Teacher(context(model=model), TeacherArgs(base="older", weight=weight))


def test_a_teachers_prediction_is_learned_and_logged() -> None:
    from trainer.hooks import Hook as Base

    told: list[tuple[Tensor, ...]] = []

    class Listen(Base):
        def on_prediction(self, run: Run, event: Any) -> None:
            told.append((event.pred.detach(), event.xt, event.t))

    hook = teaching(Older, 3.0)
    run, older = make_run(steps=1, hooks=[hook, Listen(context())]), Older()
    hook.on_model(ModelLoaded(run.family, torch.device("cpu")))
    samples = run.dataset.micro(0)
    (step,) = train(run)
    pred, xt, t = told[0]
    error = ((pred - older.predict(xt, t, older.encode(samples.captions))) ** 2).mean().item()
    assert step.terms["teacher"] == pytest.approx(error, rel=1e-5)
    assert step.loss == pytest.approx(step.terms["raw"] + 3 * error + step.terms["penalty"], rel=1e-5)
    plain = make_run(steps=1)
    list(train(plain))
    assert not equal(tensors(plain), tensors(run))


def test_a_teacher_of_another_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"older predicts epsilon on .*v_prediction: a teacher must have the path"):
        teaching(Other, 1.0).on_model(ModelLoaded(make_run().family, torch.device("cpu")))


# --- collapse


def step(number: int, raw: float) -> Step:
    return Step(number, 1, 9.0, {"raw": raw}, {}, {}, 1.0)


def test_a_loss_that_rises_and_stays_there_ends_the_run() -> None:
    hook = Collapse(context(), CollapseArgs(loss=2.0, window=3))
    fake: Any = None
    losses = [1.0, 0.4, 0.5, 0.6, 3.0, 0.9, 0.99, 3.0, 1.0]
    found = [hook.wants_stop(fake, step(n, raw)) for n, raw in enumerate(losses)]
    # medians from the third on: .5 .5 .6 .9 .99 .99 1
    assert found == [None] * 8 + ["the median raw loss of the last 3 steps is 1, and was 0.5"]


def test_what_the_losses_were_goes_with_the_checkpoint() -> None:
    fake: Any = None
    first, second = (Collapse(context(), CollapseArgs(loss=2.0, window=3)) for _ in range(2))
    for n, raw in enumerate([0.5, 0.5, 0.5, 9.0]):
        first.wants_stop(fake, step(n, raw))
    second.load_state_dict(first.state_dict())
    assert second.wants_stop(fake, step(4, 9.0)) == "the median raw loss of the last 3 steps is 9, and was 0.5"


def drawn(folder: Path, *colours: tuple[int, int, int]) -> tuple[Path, ...]:
    """Pictures half black, half of a colour."""
    folder.mkdir()
    for number, colour in enumerate(colours):
        picture = Image.new("RGB", (8, 8))
        picture.paste(colour, (0, 0, 4, 8))
        picture.save(folder / f"{number}.png")
    return tuple(sorted(folder.iterdir()))


def test_samples_that_went_flat_or_alike_end_the_run(tmp_path: Path) -> None:
    before = drawn(tmp_path / "before", (200, 200, 200), (0, 0, 200))
    assert look(before).contrast == pytest.approx((100 + 100 * 0.114) / 2)
    assert look(before).difference == pytest.approx(math.sqrt(200**2 * 2 / 3 / 2))
    rows = {
        "good": drawn(tmp_path / "good", (200, 200, 200), (0, 0, 150)),
        "went flat": drawn(tmp_path / "flat", (20, 20, 20), (0, 0, 20)),
        "became alike": drawn(tmp_path / "alike", (200, 200, 200), (200, 200, 199)),
    }
    fake: Any = None
    for name, files in rows.items():
        hook = Collapse(context(sample={"every": 1}), CollapseArgs(samples=0.3))
        hook.on_row(fake, RowDrawn("after_1", rows["went flat"], before))
        assert hook.wants_stop(fake, step(1, 1.0)) is None, "after training it is too late"
        hook.on_row(fake, RowDrawn("step_000001", files, before))
        reason = hook.wants_stop(fake, step(1, 1.0))
        assert (reason is None) if name == "good" else (reason is not None and name in reason)
        assert hook.wants_stop(fake, step(2, 1.0)) is None
    with pytest.raises(PartError, match=r"set sample.every above 0"):
        Collapse(context(), CollapseArgs(samples=0.3))


# --- which hooks a run has


def names(**hooks: object) -> list[str]:
    return [hook.name for hook in compose.chosen(HooksArgs.model_validate({"tensorboard": False, **hooks}))]


def test_hooks_are_in_the_order_of_the_args() -> None:
    standard = list(compose.STANDARD)
    assert names() == standard
    assert names(collapse={"loss": 2.0}, ema={"decay": 0.9}) == [*standard, "ema", "collapse"]
    mine = "trainer.hooks.samples:Samples"
    extra = [mine, "metrics", {"use": "grad_stats", "options": {"every": 3}}]
    assert names(teacher={"base": "x"}, extra=extra) == [*standard, "teacher", "Samples", "grad_stats"]


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"use": "ema", "options": {"decya": 0.9}}, r"decya is not an option; did you mean decay\? \(allowed: decay, "),
        ({"use": "ema", "options": {"decay": 2}}, r"decay: input should be less than 1 \(given: 2\)"),
        ("ema", "does nothing unless its option decay is set"),
        ({"use": "metrics", "options": {"every": 1}}, "takes no options, and was given every"),
        ({"use": "grad_stat"}, r"did you mean grad_stats\?"),
        ({"use": "ema", "options": {"decay": 0.5}}, "there is a hook 'ema' in this run already"),
    ],
)
def test_a_mistake_in_an_extra_hook_is_named(extra: object, sentence: str) -> None:
    with pytest.raises(PartError, match=sentence):
        names(extra=[extra], ema={"decay": 0.9} if "already" in sentence else {})


@pytest.mark.parametrize(
    ("hooks", "sentence"),
    [
        ({"ema": {"warmup": 3}}, "warmup does nothing unless decay is set"),
        ({"ema": {"decay": 0.9, "samples": False, "export": False}}, "neither samples nor export"),
        ({"collapse": {"samples": 0.1, "window": 3}}, "window does nothing unless loss is set"),
        ({"teacher": {"weight": 2.0}}, "weight does nothing unless base is set"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(hooks: dict[str, Any], sentence: str) -> None:
    with pytest.raises(cli.CommandError, match=sentence):
        cli.validate({"data": {"source": "x"}, "hooks": hooks})


def test_hooks_with_options_are_read_from_the_command_line() -> None:
    given = {"use": "a.py:A", "options": {"x": [1, "b"]}}
    argv = ["--data.source", "x", "--hooks.extra", "one,two", "--hooks.extra", json.dumps(given), "--hooks.ema.decay"]
    args = cli.parse([*argv, "0.9"]).args
    assert args is not None
    assert args.model_dump()["hooks"]["extra"] == ("one,two", given)
    assert cli.validate(json.loads(args.model_dump_json())) == args


# --- in a run


class Seen(Hook):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.rows: list[str] = []
        self.checkpoints: list[tuple[int, Path]] = []
        self.presented_for: list[str] = []

    def on_row(self, run: Run, event: RowDrawn) -> None:
        self.rows.append(event.row)
        assert all(file.is_file() for file in (*event.files, *event.before))

    def on_checkpoint(self, run: Run, event: CheckpointSaved) -> None:
        self.checkpoints.append((event.step, event.path))
        assert (event.path / "state.json").is_file()

    def presented(self, run: Run, purpose: Purpose) -> AbstractContextManager[None]:
        self.presented_for.append(purpose)
        return nullcontext()


def test_a_run_that_a_hook_ends_exports_its_average_and_says_so(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    tree: Mapping[str, Any] = {
        "data": {"source": str(tiny_pictures)},
        "model": {"base": str(tiny_base)},
        "adapter": {"rank": 2},
        "sample": {"prompts": ["a star"], "steps": 1, "strengths": [1.0], "every": 2},
        "hooks": {
            "tensorboard": False,
            "ema": {"decay": 0.9, "warmup": 0},
            "grad_stats": {"every": 1},
            "activations": {"layers": ["denoiser.mid_block"], "every": 1},
            "noise_jitter": {"strength": 0.1},
            "teacher": {"base": str(tiny_base)},
            "collapse": {"loss": 1.0000001, "window": 2},
        },
        "runtime": {"out": str(tmp_path), "steps": 9, "batch_size": 2, "device": "cpu"},
        "optim": {"adapter": {"lr": 0.5}},
    }
    seen = Seen(context())
    with run.opened(cli.validate(tree)) as session:
        session.run.hooks = [*session.run.hooks, seen]
        steps = list(session.steps())
    where, last = session.dir, steps[-1]
    assert 2 <= last.step < 4
    assert seen.rows == ["before", "step_000002", "after_1"]
    assert seen.presented_for == ["samples", "samples", "export"], "not for the row before training"
    assert seen.checkpoints == [(last.step, where.checkpoint(last.step))]
    (after,) = (where.samples / "after_1").iterdir()
    drawn_first = after.read_bytes()
    assert {"teacher", "raw"} <= last.terms.keys()
    assert {"activation_std/denoiser.mid_block", "grad/adapter/mid_block", "grad/dead"} <= last.extra.keys()
    assert where.newest_checkpoint() == (last.step, where.checkpoint(last.step))
    found = json.loads(where.stopped.read_text())
    assert (found["step"], found["of"], found["by"]) == (last.step, 9, "collapse")
    assert f"after step {last.step} by collapse: the median raw loss" in page(where)
    average = safetensors.torch.load_file(where.checkpoint(last.step) / "hook_ema.safetensors")
    exported = safetensors.torch.load_file(where.export / "run.safetensors")
    ups = sorted(t.double().norm().item() for name, t in average.items() if "lora_B" in name)
    shipped = sorted(t.double().norm().item() for name, t in exported.items() if "lora_up" in name)
    assert shipped == pytest.approx(ups, rel=1e-3)
    more = session.args.hooks.model_copy(update={"collapse": CollapseArgs.model_validate({})})
    with run.resumed(where.root, session.args.model_copy(update={"hooks": more})) as session:
        assert session.start == last.step
        assert [step.step for step in session.steps()][-1] == 9
    assert not where.stopped.exists()
    assert after.read_bytes() != drawn_first, "the row after training is of the whole run"
