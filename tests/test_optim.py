"""Optimizers: each setting is read back where it acts; what has rate 0 does not move; a resumed one goes on alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prodigyopt import Prodigy
from torch import nn
from torch.optim import Optimizer

from trainer import extras
from trainer.args import ComponentOptim, OptimArgs
from trainer.checkpoint import flatten, unflatten
from trainer.optim import OPTIMIZERS, HasAverages, Rates, build, check, evaluated, logged, step
from trainer.optim.table import MATRICES, REFUSED
from trainer.registry import PartError

Named = list[tuple[str, nn.Parameter]]

# A setting of each that only it has: it must arrive like the common ones.
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"amsgrad": True, "foreach": False},
    "adam": {"amsgrad": True},
    "sgd": {"momentum": 0.8, "nesterov": True},
    "rmsprop": {"alpha": 0.9, "centered": True},
    "adagrad": {"initial_accumulator_value": 0.1},
    "adadelta": {"rho": 0.8},
    "adamax": {"foreach": False},
    "nadam": {"momentum_decay": 0.01},
    "radam": {"decoupled_weight_decay": True},
    "adafactor": {"d": 2.0, "eps": None},
    "muon": {"momentum": 0.9, "ns_steps": 3},
    "prodigy": {"d_coef": 2.0, "use_bias_correction": False},
    "prodigy-plus": {"d_coef": 2.0, "use_cautious": True},
    "schedulefree-adamw": {"r": 0.5},
    "schedulefree-radam": {"silent_sgd_phase": False},
    "schedulefree-sgd": {"momentum": 0.8},
    "ademamix8bit": {"alpha": 2.0},
    "sgd8bit": {"momentum": 0.8},
    "lion": {},
    "came": {"clip_threshold": 2.0},
}
KEPT_AS = {("sgd8bit", "momentum"): lambda group: group["betas"][0]}
NAMES = [*OPTIMIZERS, "lion", "came"]  # and two of the catalogue
BETAS = {"ademamix8bit": 3, "pagedademamix8bit": 3, "came": 3}
UNLIKE = {"came": ("eps",)}  # names of the constructor that mean something else, or are not there


def args(**options: Any) -> ComponentOptim:
    return ComponentOptim.model_validate({"lr": 1e-3, **options})


def parameter(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value, -2 * value]))


def low_rank() -> Named:
    """What a LoRA trains: A at random, B at zero."""
    generator = torch.Generator().manual_seed(0)
    return [
        ("a", nn.Parameter(torch.randn(4, 8, generator=generator))),
        ("b", nn.Parameter(torch.zeros(8, 4))),
        ("c", nn.Parameter(torch.randn(6, 6, generator=generator))),
    ]


def push(optimizer: Optimizer, named: Named, seed: int) -> None:
    """One update with gradients that depend on the seed and on where the parameters are."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for _, p in named:
        p.grad = p.detach() - 3.0 + 0.1 * torch.randn(p.shape, generator=generator)
    step(optimizer)
    optimizer.zero_grad(set_to_none=True)


def set_rates(optimizer: Optimizer, rates: Sequence[float]) -> None:
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


def copies(named: Named) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p in named]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def settings_of(name: str) -> dict[str, Any]:
    """Values that no optimizer has by itself, of the settings that this one has."""
    import inspect

    from trainer.optim.table import _factory

    takes = inspect.signature(_factory(name, "optim.adapter", code=False)).parameters
    common: dict[str, Any] = {
        "betas": (0.8, 0.95, 0.985)[: BETAS.get(name, 2)],
        "eps": 1e-5,
        "weight_decay": 0.25,
    }
    single = {key for key in takes if key not in UNLIKE.get(name, ()) and not isinstance(takes[key].default, str)}
    if "eps" in takes and not isinstance(takes["eps"].default, float):
        single -= {"eps"}
    return {"lr": 0.5, **{key: value for key, value in common.items() if key in single}}


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_arrives(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    named, given = low_rank(), settings_of(name)
    options = {key: value for key, value in OPTIONS.get(name, {}).items() if key != "eps"}
    optimizer = build(args(name=name, **given, options=options), named)
    (group,) = optimizer.param_groups
    for key, value in {**given, **options}.items():
        found = (
            KEPT_AS[name, key](group)
            if (name, key) in KEPT_AS
            else group[key]
            if key in group
            else getattr(optimizer, key)
        )
        assert (tuple(found) if isinstance(found, list) else found) == value, key
    assert group["params"] == [p for _, p in named]
    assert group["param_names"] == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_torchs_own_have_the_projects_betas_and_extras_their_own() -> None:
    def betas(name: str) -> Any:
        return tuple(build(args(name=name), low_rank()).param_groups[0]["betas"])

    assert betas("adamw") == betas("radam") == betas("prodigy") == (0.9, 0.99)
    assert betas("schedulefree-adamw") == (0.9, 0.999)
    assert build(args(name="adagrad"), low_rank()).param_groups[0]["eps"] == 1e-10
    assert build(args(name="muon"), low_rank()).param_groups[0]["weight_decay"] == 0.0  # torch's own default is 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "adamww"}, r"optim.adapter.name 'adamww' is unknown; did you mean adamw\?"),
        ({"name": "ademamx"}, r"did you mean ademamix\?"),
        ({"name": "prodgy"}, r"did you mean prodigy\?"),
        ({"options": {"momentm": 1}}, r"options has momentm, which adamw has not \(it has amsgrad, maximize"),
        ({"name": "sgd", "options": {"momentm": 1}}, r"did you mean momentum\? \(it has momentum, dampening"),
        ({"options": {"lr": 1}}, "options has lr, which is an option of its own: optim.adapter.lr"),
        ({"name": "sgd", "betas": (0.9, 0.9)}, "optim.adapter.betas is .*, but sgd has no betas"),
        ({"name": "sgd", "eps": 1e-9}, "but sgd has no eps"),
        ({"name": "prodigy", "betas": (0.9, 0.9, 0.9)}, "prodigy cannot be made|betas has 3 numbers"),
        ({"name": "ademamix8bit", "betas": (0.9, 0.9)}, "betas has 2 numbers, but ademamix8bit takes 3"),
        ({"name": "sgd", "options": {"nesterov": True}}, "sgd cannot be made with .*momentum"),
        ({"name": "ranger21"}, "options lacks num_iterations, which ranger21 needs"),
    ],
)
def test_what_an_optimizer_has_not_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PartError, match=said):
        build(args(**options), low_rank())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_here_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(PartError, match=f"'{name}' cannot train here: .{{20}}"):
        check(OptimArgs.model_validate({"adapter": {"name": name}}))


def test_an_extra_that_is_not_installed_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, extra in (
        ("lion8bit", "bitsandbytes"),
        ("schedulefree-sgd", "schedulefree"),
        ("prodigy-plus", "prodigy-plus"),
        ("lion", "optimizers"),
    ):
        with pytest.raises(PartError, match=f"pip install '{extras.EXTRAS[extra]}'"):
            check(OptimArgs.model_validate({"rows": {"name": name}}))


def test_the_extras_are_the_versions_that_are_tested() -> None:
    pinned = (Path(__file__).parents[1] / "requirements-dev.in").read_text().split()
    assert {extras.EXTRAS[name] for name in ("optimizers", "schedulefree", "prodigy-plus", "bitsandbytes")} <= set(
        pinned
    )


def test_adamw_takes_the_textbook_step_with_decoupled_decay() -> None:
    p = parameter()
    optimizer = build(args(lr=0.1, weight_decay=0.5), [("p", p)])
    p.grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    # the first Adam step is lr * sign(g); decay takes lr * wd * p
    torch.testing.assert_close(p.data, torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]))


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_adam_is_one_operator_on_a_cpu_with_the_numbers_of_the_plain_one(name: str) -> None:
    plain, mine = low_rank(), low_rank()
    theirs = build(args(name=name, lr=0.1, weight_decay=0.1, options={"foreach": False}), plain)
    optimizer = build(args(name=name, lr=0.1, weight_decay=0.1), mine)
    assert [one.param_groups[0]["fused"] for one in (optimizer, theirs)] == [True, None]
    for seed in range(5):
        push(theirs, plain, seed)
        push(optimizer, mine, seed)
    for one, other in zip(copies(mine), copies(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_prodigy_is_the_published_one_with_bias_correction_and_safeguard() -> None:
    ours, theirs = parameter(), parameter()
    a = build(args(name="prodigy", lr=1.0, weight_decay=0.1), [("p", ours)])
    b = Prodigy([theirs], lr=1.0, betas=(0.9, 0.99), weight_decay=0.1, use_bias_correction=True, safeguard_warmup=True)
    for _ in range(30):
        for p, optimizer in ((ours, a), (theirs, b)):
            p.grad = p.detach() - 5.0
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert logged("adapter", a) == {"adapter": a.param_groups[0]["d"]}
    assert a.param_groups[0]["d"] > 1e-6
    Rates(args(name="prodigy", lr=0.5), 10).put(a, 0.0)
    assert logged("adapter", a) == {"adapter": 0.5 * a.param_groups[0]["d"]}


def test_a_setting_called_d_is_no_rate_that_was_found() -> None:
    assert logged("adapter", build(args(name="adafactor", lr=0.5, options={"d": 2.0}), low_rank())) == {"adapter": 0.5}


def test_a_scale_multiplies_the_rate_of_its_own_parameters() -> None:
    """LoRA+ (arXiv 2402.12354): B learns 16 times as fast as A; the first step of Adam is lr * sign(g)."""
    a, b, c = parameter(), parameter(), parameter()
    optimizer = build(args(lr=0.01), [("a", a), ("b", b), ("c", c)], {"b": 16.0})
    assert [(group["param_names"], group["scale"]) for group in optimizer.param_groups] == [
        (["a", "c"], 1.0),
        (["b"], 16.0),
    ]
    Rates(args(lr=0.01), 10).put(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.16]
    assert logged("adapter", optimizer) == {"adapter": 0.01}
    for p in (a, b, c):
        p.grad = torch.tensor([3.0, -4.0])
    step(optimizer)
    for p, lr in ((a, 0.01), (b, 0.16), (c, 0.01)):
        torch.testing.assert_close(p.data, torch.tensor([1.0 - lr, -2.0 + lr]))


def test_prodigy_refuses_several_rates() -> None:
    with pytest.raises(ValueError, match=r"finds one rate for all parameters, but .* at several \(times 1, 16\)"):
        build(args(name="prodigy", lr=1.0), [("a", parameter()), ("b", parameter())], {"b": 16.0})


@pytest.mark.parametrize("name", MATRICES)
def test_what_trains_matrices_names_what_is_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} trains matrices alone, and of 1 tensors such as conv"):
        build(args(name=name), [*low_rank(), ("conv", nn.Parameter(torch.zeros(2, 2, 3, 3)))])


def check_optimizer(name: str, **options: Any) -> None:
    """Rate 0 and no gradient keep a tensor as it is, a rate moves it; a saved optimizer goes on to the last bit."""

    def new(values: Sequence[torch.Tensor] = ()) -> tuple[Named, Optimizer]:
        named = low_rank()
        for (_, p), value in zip(named, values, strict=False):
            p.data.copy_(value)
        scales = {} if name in ("prodigy",) or name.startswith("dadapt") else {"b": 2.0}
        return named, build(args(name=name, lr=0.05, weight_decay=0.0, **options), named, scales)

    named, optimizer = new()
    groups = len(optimizer.param_groups)
    start = copies(named)
    for seed in range(6):  # RAdam does not move in the first few
        push(optimizer, named, seed)
    assert not any(torch.equal(a, b) for a, b in zip(start, copies(named), strict=True)), "nothing moves at a rate"
    before = copies(named)
    set_rates(optimizer, [0.0] * groups)
    push(optimizer, named, 3)
    assert same(before, copies(named)), "it moves at rate 0"
    set_rates(optimizer, [0.05] * groups)
    named[0][1].grad, named[1][1].grad = None, torch.ones(8, 4)
    step(optimizer)
    after = copies(named)
    assert torch.equal(after[0], before[0]), "it moves without a gradient"
    assert not torch.equal(after[1], before[1])

    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(flatten(optimizer.state_dict(), tensors)))
    kept = {key: value.detach().clone() for key, value in tensors.items()}
    again, second = new(after)
    second.load_state_dict(unflatten(tree, kept))
    for seed in range(4, 8):
        push(optimizer, named, seed)
        push(second, again, seed)
    assert same(copies(named), copies(again)), "it does not go on alike"
    with evaluated([optimizer]), evaluated([second]):
        assert same(copies(named), copies(again)), "what it has found is not alike"


@pytest.mark.parametrize("name", NAMES)
def test_at_rate_0_nothing_moves_and_what_is_saved_goes_on_alike(name: str) -> None:
    eight = {"min_8bit_size": 16} if name.endswith("8bit") else {}  # else so small a tensor is kept in 32 bits
    check_optimizer(name, options=eight | ({"momentum": 0.9} if name == "sgd8bit" else {}))


@pytest.mark.slow
def test_every_other_name_of_the_catalogue_does_so_too() -> None:
    import pytorch_optimizer

    failed: dict[str, str] = {}
    needing = {"ranger21": {"num_iterations": 20}}
    for name in pytorch_optimizer.get_supported_optimizers():
        if name in REFUSED or name in OPTIMIZERS:
            continue
        try:
            check_optimizer(name, options=needing.get(name, {}))
        except (AssertionError, LookupError, ValueError, TypeError, RuntimeError) as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())


def test_decay_and_momentum_do_not_move_what_has_rate_0() -> None:
    for name, options in {"sgd": {"momentum": 0.9}, "adamw": {}, "prodigy": {}, "schedulefree-adamw": {}}.items():
        named = low_rank()
        optimizer = build(args(name=name, lr=1.0, weight_decay=0.5, options=options), named)
        for rate, moves in ((0.0, False), (1.0, True), (0.0, False)):
            set_rates(optimizer, [rate])
            before = copies(named)
            push(optimizer, named, 0)
            assert same(before, copies(named)) != moves, name


@pytest.mark.parametrize("name", ["schedulefree-adamw", "schedulefree-sgd", "prodigy-plus", "splus"])
def test_averages_are_put_in_and_taken_out_to_the_last_bit(name: str) -> None:
    """What was found is what the package's own eval() gives, and training goes on as if nobody had looked."""
    named, twin = low_rank(), low_rank()
    looked, plain = build(args(name=name, lr=0.05), named), build(args(name=name, lr=0.05), twin)
    assert isinstance(looked, HasAverages)
    for seed in range(6):
        push(looked, named, seed)
        push(plain, twin, seed)
        before = copies(named)
        with evaluated([looked]):
            found = copies(named)
        assert same(before, copies(named))
        assert seed < 2 or not same(found, before)
    assert same(copies(named), copies(twin))
    plain.eval()  # type: ignore[attr-defined]
    assert same(found, copies(twin))


def test_an_optimizer_without_averages_is_left_alone() -> None:
    named = low_rank()
    optimizer = build(args(), named)
    before = copies(named)
    with evaluated([optimizer]):
        assert same(before, copies(named))


@pytest.mark.parametrize("name", ["prodigy", "prodigy-plus"])
def test_prodigy_with_the_rate_of_another_optimizer_is_pointed_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(args(name=name, lr=1e-4), low_rank())
    assert "give 1" in caplog.text


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        build(args(), [])


def test_flags_give_numbers_and_truth_values() -> None:
    given = args(name="sgd", options={"momentum": "0.9", "nesterov": "true", "word": "rms"}).options
    assert given == {"momentum": 0.9, "nesterov": True, "word": "rms"}


# --- of a file


def drop_in(tmp_path: Path, body: str) -> str:
    file = tmp_path / "own.py"
    file.write_text(f"import torch\n\n\n{body}", encoding="utf-8")
    return str(file)


def test_an_optimizer_of_a_file_gets_its_parameters_its_rate_and_its_options(tmp_path: Path) -> None:
    file = drop_in(
        tmp_path,
        "def get_optimizer(params, lr, *, speed=1.0):\n    return torch.optim.SGD(params, lr, momentum=speed / 10)\n",
    )
    named = low_rank()
    optimizer = build(args(name=f"{file}:get_optimizer", lr=0.5, options={"speed": 3}), named, {"b": 2.0})
    assert [group["momentum"] for group in optimizer.param_groups] == [0.3, 0.3]
    assert [group["param_names"] for group in optimizer.param_groups] == [["a", "c"], ["b"]]
    assert [group["scale"] for group in optimizer.param_groups] == [1.0, 2.0]
    with pytest.raises(PartError, match=r"options has sped, which .* has not; did you mean speed\?"):
        build(args(name=f"{file}:get_optimizer", options={"sped": 3}), low_rank())
    with pytest.raises(PartError, match=r"weight_decay is 0.1, but .*get_optimizer has no weight_decay"):
        build(args(name=f"{file}:get_optimizer", weight_decay=0.1), low_rank())


def test_what_is_no_optimizer_is_refused(tmp_path: Path) -> None:
    file = drop_in(tmp_path, "def get_optimizer(params, lr, **options):\n    return options\n")
    with pytest.raises(PartError, match="gave a dict, not an Optimizer"):
        build(args(name=f"{file}:get_optimizer"), low_rank())


@pytest.mark.parametrize(
    "tree",
    [
        {"adapter": {"name": "{file}:get_optimizer"}},
        {"rows": {"curve": "{file}:get_scheduler"}},
        {"rules": [{"match": "*", "curve": "{file}:get_scheduler"}]},
    ],
)
def test_code_is_refused_where_it_is_not_allowed(tree: dict[str, Any], tmp_path: Path) -> None:
    file = drop_in(tmp_path, "raise SystemExit('this ran')\n")
    optim = OptimArgs.model_validate(json.loads(json.dumps(tree).replace("{file}", file)))
    with pytest.raises(PartError, match="would import code, which is refused here"):
        check(optim, code=False)
    with pytest.raises(SystemExit, match="this ran"):
        check(optim)
