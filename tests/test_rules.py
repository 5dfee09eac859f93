"""Layer rules on a real small run: what is frozen does not move, what is trained does; what never moved is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small import equal, make_run, tensors
from torch import Tensor, nn

from trainer.args import OptimArgs, RuleArgs, TrainArgs
from trainer.checkpoint import load, save
from trainer.loop import Run, train
from trainer.optim import assigned, described, moved, prepare, usual
from trainer.optim.waiting import Waiting

NAMES = ("down.0.attn1.to_q.lora_A.weight", "down.0.attn1.to_q.lora_B.weight", "mid.attn2.to_k.lora_A.weight")


def named() -> dict[str, list[tuple[str, nn.Parameter]]]:
    return {
        "adapter": [(name, nn.Parameter(torch.ones(2, 2))) for name in NAMES],
        "rows": [("text_encoder", nn.Parameter(torch.ones(1, 2)))],
    }


def rules(*trees: dict[str, Any]) -> tuple[RuleArgs, ...]:
    return OptimArgs.model_validate({"rules": trees}).rules


def section(tree: dict[str, Any]) -> OptimArgs:
    return usual.filled(OptimArgs.model_validate(tree), usual.WIDTHS, 1.0)


def ruled(steps: int, optim: dict[str, Any]) -> Run:
    """A small run whose optimizers and rates are those of a section, as the composition root makes them."""
    run = make_run(steps=steps)
    args = section(optim)
    run.optimizers, run.lr = prepare(args, steps, run.components, {name: {} for name in run.components})
    return run


def movements(run: Run) -> dict[str, list[bool]]:
    """Parameter -> whether each update moved it."""
    before, seen = tensors(run), {name: list[bool]() for name in tensors(run)}
    for _ in train(run):
        after = tensors(run)
        for name, flags in seen.items():
            flags.append(not torch.equal(before[name], after[name]))
        before = after
    return seen


@pytest.mark.parametrize(
    ("match", "hits"),
    [
        ("*", [*NAMES, "text_encoder"]),
        ("*.lora_B.*", [NAMES[1]]),
        ("mid", [NAMES[2]]),
        ("down.0.attn1.to_q", list(NAMES[:2])),
        (r"re:.*attn\d\.to_[qk]", list(NAMES)),
        ("text_encoder", ["text_encoder"]),
    ],
)
def test_a_pattern_is_over_parameters_and_their_modules(match: str, hits: list[str]) -> None:
    found = assigned(rules({"match": match, "lr_scale": 0.5}), named())
    assert [name for of in found.values() for name in of] == hits


def test_from_and_to_are_the_same_window() -> None:
    (rule,) = rules({"match": "down_blocks.*", "lr_scale": 0.3, "from": 0.2, "to": 0.8})
    assert (rule.after, rule.until, rule.lr_scale) == (0.2, 0.8, 0.3)
    assert rules(rule.model_dump(mode="json")) == (rule,), "saved and read again"
    with pytest.raises(ValidationError, match="from and after are two names for one thing"):
        rules({"match": "*", "from": 0.1, "after": 0.1})


def test_the_first_rule_that_matches_holds_and_the_table_says_so() -> None:
    given = rules({"match": "*lora_B*", "lr_scale": 4}, {"match": "down", "until": 0.5})
    found = assigned(given, named())
    assert {name: rule.match for name, rule in found["adapter"].items()} == {NAMES[1]: "*lora_B*", NAMES[0]: "down"}
    assert described(given, found) == [
        f"rule *lora_B*: rate times 4: 1 tensors: {NAMES[1]}",
        f"rule down: trained from 0% to 50% of the run, frozen before and after: 1 tensors: {NAMES[0]}",
    ]


def test_a_pattern_that_matches_nothing_is_named_with_what_is_near() -> None:
    with pytest.raises(ValueError, match=r"'\*\.attn3\.\*' matches nothing that is trained; near are attn"):
        assigned(rules({"match": "*.attn3.*", "lr_scale": 2}), named())
    with pytest.raises(ValueError, match="all 2 tensors that 'down' matches obey an earlier rule"):
        assigned(rules({"match": "*lora*", "lr_scale": 2}, {"match": "down", "lr_scale": 3}), named())


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"match": "x"}, "changes nothing"),
        ({"match": "x", "after": 0.5, "until": 0.5}, "must be below"),
        ({"match": "re:(", "lr_scale": 2}, "no regular expression"),
        ({"match": "x", "curve": "hard_pivot"}, "is for components"),
        ({"match": "x", "lr_scale": 0}, "greater than 0"),
        ({"match": "x", "curve": "linaer"}, r"did you mean linear\?"),
    ],
)
def test_rules_that_say_nothing_are_refused(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        rules(tree)


@pytest.mark.parametrize("name", ["adamw", "prodigy", "sgd"])
def test_what_is_frozen_does_not_move_and_what_is_trained_does(name: str) -> None:
    own = {"name": name, "weight_decay": 0.1, "lr": 1.0 if name == "prodigy" else 0.01}
    own |= {"options": {"momentum": 0.9}} if name == "sgd" else {}
    rule = {"match": "down.weight", "after": 0.3, "until": 0.7}
    seen = movements(ruled(10, {"adapter": own, "rows": {**own}, "rules": [rule]}))
    assert seen["down.weight"] == [False] * 3 + [True] * 4 + [False] * 3
    assert all(seen["up.weight"])


def test_a_rate_a_curve_and_the_log_of_a_rule() -> None:
    run = ruled(
        10, {"adapter": {"lr": 0.5}, "rules": [{"match": "up*", "lr_scale": 0.1, "after": 0.5, "curve": "linear"}]}
    )
    steps = list(train(run))
    assert [step.lr["adapter"] for step in steps] == [0.5] * 10
    expected = [0.0] * 5 + [0.05 * (1 - i / 5) for i in range(5)]
    assert [step.lr["adapter/up*"] for step in steps] == pytest.approx(expected)


def test_what_is_frozen_counts_in_no_norm() -> None:
    run = ruled(4, {"rules": [{"match": "up.weight", "after": 0.5}]})
    norms = [step.grad_norm["adapter"] for step in train(run)]
    assert norms[:2] == [0.0, 0.0]  # A has no gradient before B moves
    assert min(norms[2:]) > 0


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedulefree-adamw"])
def test_a_hard_pivot_moves_rows_and_then_the_adapter(name: str) -> None:
    own = {"name": name, "curve": "hard_pivot", "weight_decay": 0.1, "lr": 1.0 if name == "prodigy" else 0.01}
    seen = movements(ruled(10, {"adapter": own, "rows": own, "pivot": 0.5}))
    assert seen["rows"] == [True] * 5 + [False] * 5
    assert seen["up.weight"] == [False] * 5 + [True] * 5


def test_what_a_rule_freezes_all_along_is_refused() -> None:
    with pytest.raises(ValueError, match="freezes its tensors in all 4 updates"):
        ruled(4, {"rules": [{"match": "up*", "after": 0.8, "until": 0.9}]})


def test_prodigy_takes_windows_but_no_rates_of_rules() -> None:
    with pytest.raises(ValueError, match="finds one rate for all"):
        ruled(4, {"adapter": {"name": "prodigy", "lr": 1}, "rules": [{"match": "up*", "lr_scale": 2}]})


def test_a_rule_gives_a_precision_to_both_halves_or_to_none() -> None:
    components = named()
    args = section({"rules": [{"match": "down", "dtype": "bf16"}]})
    optimizers, _ = prepare(args, 4, components, {"adapter": {}, "rows": {}})
    assert [p.dtype for _, p in components["adapter"]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert optimizers["adapter"].param_groups[0]["params"][0].dtype == torch.bfloat16
    half = section({"rules": [{"match": "*lora_B*", "dtype": "bf16"}]})
    with pytest.raises(ValueError, match=r"multiplied with each other; match the layer down\.0\.attn1\.to_q"):
        prepare(half, 4, named(), {"adapter": {}, "rows": {}})


def test_each_component_is_clipped_to_its_own_norm_or_not_at_all() -> None:
    args = OptimArgs.model_validate({"adapter": {"max_grad_norm": 0.5}, "max_grad_norm": 0})
    assert (args.clip(args.adapter), args.clip(args.rows)) == (0.5, 0)
    run = make_run(steps=1)
    run.max_grad_norm = {"adapter": 1e-4, "rows": 0}
    seen: dict[str, torch.Tensor] = {}

    def remember(component: str) -> Any:
        return lambda optimizer, *_: seen.update(
            {
                component: torch.cat(
                    [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
                ).norm()
            }
        )

    for component, optimizer in run.optimizers.items():
        optimizer.register_step_pre_hook(remember(component))
    step = next(train(run))
    assert seen["adapter"].item() == pytest.approx(1e-4, rel=1e-2) != pytest.approx(step.grad_norm["adapter"])
    assert seen["rows"].item() == pytest.approx(step.grad_norm["rows"])


# --- what never moved


def test_a_run_moves_all_that_it_trains() -> None:
    run = make_run(steps=12)
    before = moved.marks(run.components)
    list(train(run))
    moved.check(before, run.components, moved.updates(run.optimizers, run.lr, 12))


def test_a_tensor_that_never_moves_is_named() -> None:
    run = make_run(steps=12)
    forgotten = nn.Parameter(torch.ones(3))
    run.components = {**run.components, "adapter": [*run.components["adapter"], ("forgotten.weight", forgotten)]}
    args = section({})
    run.optimizers, run.lr = prepare(args, 12, run.components, {"adapter": {}, "rows": {}})
    before = moved.marks(run.components)
    list(train(run))
    with pytest.raises(moved.NeverMoved, match=r"1 of 4 trained tensors never moved: forgotten\.weight\."):
        moved.check(before, run.components, moved.updates(run.optimizers, run.lr, 12))
    moved.check(before, run.components, moved.updates(run.optimizers, run.lr, 2))  # too few to tell


def test_a_zero_that_changed_its_sign_has_not_moved() -> None:
    p = nn.Parameter(torch.zeros(2))
    components = {"adapter": [("b", p)]}
    before = moved.marks(components)
    p.data.neg_()
    with pytest.raises(moved.NeverMoved, match="b"):
        moved.check(before, components, {("adapter", "b"): 10})


# --- what optimizers remember, elsewhere


class Vault:
    """Memory that nobody can read: what is away is NaN, and the numbers are kept aside."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.moved = 0

    def away(self, value: Tensor) -> Tensor:
        stand_in = torch.full_like(value, 0 if value.dtype == torch.uint8 else torch.nan)
        self.kept[id(stand_in)] = value
        self.moved += 1
        return stand_in

    def back(self, value: Tensor, device: torch.device) -> Tensor:
        assert device == torch.device("cpu")
        return self.kept.pop(id(value))


@pytest.mark.parametrize("name", ["adamw", "prodigy", "sgd", "adafactor", "adagrad"])
def test_what_waits_elsewhere_changes_nothing_and_is_there_for_updates_alone(name: str) -> None:
    options = {"momentum": 0.9} if name == "sgd" else {}
    section = {"adapter": {"name": name, "lr": 1.0 if name == "prodigy" else 0.01, "options": options}}
    plain, waiting = ruled(6, section), ruled(6, section)
    optimizer, vault = waiting.optimizers["adapter"], Vault()
    (parameter,) = [p for n, p in waiting.components["adapter"] if n == "down.weight"]
    other = next(p for n, p in waiting.components["adapter"] if n != "down.weight")
    Waiting(optimizer, [parameter], vault.away, vault.back)
    for one, two in zip(train(plain), train(waiting), strict=True):
        assert one.loss == two.loss
        tensors_away = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
        assert tensors_away, "something is remembered"
        assert all(value.isnan().all() for value in tensors_away)
        assert not any(v.isnan().any() for v in optimizer.state[other].values() if isinstance(v, Tensor))
    assert equal(tensors(plain), tensors(waiting))
    assert vault.moved == 6 * len(tensors_away)
    assert len(vault.kept) == len(tensors_away)


def test_rules_say_whose_memory_waits_and_a_resume_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = {"rules": [{"match": "up", "device": "cpu"}]}
    whole = ruled(4, {})
    expected = [step.loss for step in train(whole)]
    made: list[Waiting] = []

    def kept(*args: Any) -> Waiting:
        made.append(Waiting(*args))
        return made[-1]

    monkeypatch.setattr("trainer.optim.waiting.elsewhere", lambda parameter: True)
    monkeypatch.setattr("trainer.optim.waiting.Waiting", kept)
    first = ruled(4, section)
    assert [step.loss for _, step in zip(range(2), train(first), strict=False)] == expected[:2]
    assert sorted(made[0].names) == ["exp_avg", "exp_avg_sq", "step"], "of one tensor of two"
    save(tmp_path / "step_000002", 2, first.adapters, first.optimizers)
    second = ruled(4, section)
    assert load(tmp_path / "step_000002", second.adapters, second.optimizers) == 2
    assert sorted(made[1].names) == sorted(made[0].names), "what is loaded waits, too"
    assert [step.loss for step in train(second, 2)] == expected[2:]
    assert equal(tensors(second), tensors(whole))


def test_a_device_that_would_do_nothing_or_harm_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    tree = {"data": {"source": "x"}, "optim": {"rules": [{"match": "up", "device": "cpu"}]}}
    with pytest.raises(ValidationError, match="'up' has device cpu, which is that of the run"):
        TrainArgs.model_validate({**tree, "runtime": {"device": "cpu"}})
    TrainArgs.model_validate(tree)
    own = {"adapter": {"name": "schedulefree-adamw"}, **tree["optim"]}
    with pytest.raises(ValueError, match="'up' has device cpu, but the optimizer of adapter averages"):
        ruled(4, own)
    with caplog.at_level("INFO"):
        ruled(4, tree["optim"])
    assert "rule up: what the optimizer remembers waits on the cpu: 1 tensors: up.weight" in caplog.text
