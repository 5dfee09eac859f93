"""Family x adapter x objective x optimizer: three steps, and the same three with a save and a load between.

Not the whole product, which grows with every part: any two parts meet in at least one row.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from small import CPU, equal, items, tensors

from trainer import registry
from trainer.adapters import ADAPTERS
from trainer.adapters.textual_inversion import TextualInversion
from trainer.args import AdapterArgs, ComponentOptim, ModelArgs, ObjectiveArgs, TextArgs
from trainer.checkpoint import load, save
from trainer.dataset import Dataset
from trainer.loop import Run, train
from trainer.models import FAMILIES
from trainer.objectives import OBJECTIVES
from trainer.optim import OPTIMIZERS, Rates, build
from trainer.path import FlowPath, NoisePath, Target
from trainer.types import Adapter, Cond, ModelFamily, Predict
from trainer.view import label

# family, fixture of its base: v-prediction, and eps-prediction with two layers a block
BASES = {
    "sd15-v": ("sd15", "tiny_base"),
    "sd15-eps": ("sd15", "tiny_base_deep"),
    "sd2": ("sd2", "tiny_sd2"),
    "sdxl": ("sdxl", "tiny_sdxl"),
}

ADAPTER: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"adapter": {"kind": "lora", "rank": 2, "dropout": 0.3}},
    "lora-conv": {"adapter": {"kind": "lora", "rank": 2, "alpha": 1.0, "targets": "attention+ff+conv"}},
    "rows": {"text": {"tokens": 2}},
    "pivotal": {"adapter": {"kind": "lora", "rank": 2, "dropout": 0.3}, "text": {"tokens": 1}},
    "encoders": {
        "adapter": {"kind": "lora", "rank": 2, "rank_stabilised": True, "text": {"train": True, "targets": "all"}},
        "text": {"tokens": 1},
    },
    "dora": {"adapter": {"kind": "dora", "rank": 2, "dropout": 0.3, "targets": "attention+ff+conv"}},
    "dora-rows": {"adapter": {"kind": "dora", "rank": 2, "axis": "output", "targets": "all", "text": {"train": True}}},
    "loha": {"adapter": {"kind": "loha", "rank": 2, "targets": "attention+ff+conv", "max_norm": 0.01}},
    "lokr": {"adapter": {"kind": "lokr", "rank": 2, "factor": 4, "targets": "attention+ff+conv", "l1": 0.1}},
    "oft": {"adapter": {"kind": "oft", "block": 8}},
    "full": {"adapter": {"kind": "full", "targets": "all"}, "text": {"tokens": 1}},
    "norms": {"adapter": {"kind": "full", "targets": "norm", "text": {"train": True, "targets": "norm"}}},
}
OBJECTIVE: dict[str, dict[str, Any]] = {
    "denoise": {"kind": "denoise"},
    "denoise-all": {
        "kind": "denoise",
        "min_snr_gamma": 5.0,
        "offset_noise": 0.1,
        "mask_floor": 0.1,
        "t_min": 100,
        "prior_weight": 0.5,
    },
}
EVERYTHING: dict[str, Any] = {  # that can be on at once
    **OBJECTIVE["denoise-all"],
    "weight": {"kind": "soft_min_snr"},
    "distance": {"kind": "huber", "delta": 0.2, "schedule": "snr"},
    "levels": {"density": "logit_normal", "mean": 0.3, "shift_by": "flux"},
    "noise": {"pyramid": 0.3, "perturbation": 0.1, "condition": 0.05, "gamma": 0.01},
    "mask_prior": 0.5,
}
OPTIMIZER: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {
        "adapter": {"curve": "pivot_adapter", "weight_decay": 0.01},
        "rows": {"curve": "pivot_rows", "lr": 0.01},
        "text": {"curve": "linear"},
    },
    "prodigy": {
        "adapter": {"name": "prodigy", "lr": 1.0, "curve": "cosine", "warmup": 0.3},
        "rows": {"name": "prodigy", "lr": 1.0},
        "text": {"name": "prodigy", "lr": 1.0, "weight_decay": 0.01},
    },
    "averages": {
        "adapter": {"name": "schedulefree-adamw", "lr": 0.01},
        "rows": {"name": "prodigy-plus", "lr": 1.0},
        "text": {"name": "schedulefree-adamw", "lr": 0.01},
    },
}


def test_the_matrix_has_a_row_for_every_part() -> None:
    assert {family for family, _ in BASES.values()} == set(FAMILIES)
    assert {row["adapter"]["kind"] for row in ADAPTER.values() if "adapter" in row} == set(ADAPTERS)
    assert {row["kind"] for row in OBJECTIVE.values()} == set(OBJECTIVES)
    used = {section.get("name", "adamw") for row in OPTIMIZER.values() for section in row.values()}
    assert used <= set(OPTIMIZERS)  # the loop tells optimizers apart by their averages alone; test_optim.py has each


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> ModelFamily:
    """The family of a row of BASES, loaded once: adapters leave it as it was."""
    name, base = BASES[request.param]
    path: Path = request.getfixturevalue(base)
    return registry.load(FAMILIES, name, "family").load(ModelArgs(base=str(path)), torch.device("cpu"))


def make_adapters(row: dict[str, dict[str, Any]]) -> list[Adapter]:
    adapters: list[Adapter] = []
    if "text" in row:
        adapters.append(TextualInversion(TextArgs.model_validate(row["text"]), "TOK", 0, None))
    if "adapter" in row:
        args = AdapterArgs.model_validate(row["adapter"])
        adapters.append(registry.load(ADAPTERS, args.kind, "adapter")(args, 0))
        if args.text.train:
            adapters.append(registry.load(ADAPTERS, args.kind, "adapter")(args.for_text(), 1, "text"))
    return adapters


def make_dataset(family: ModelFamily) -> Dataset:
    side = family.resolution
    pictures = items([(side, side)] * 3 + [(side * 2, side)] * 2)
    generator = torch.Generator().manual_seed(0)
    scale = family.latent_scale
    latents = {
        p.name: torch.randn(4, p.bucket[1] // scale, p.bucket[0] // scale, generator=generator) for p in pictures
    }
    latents |= {label(name, mirrored=True): latent.flip(-1) for name, latent in latents.items()}
    masks = {"p0": torch.eye(side // scale)[None]}
    priors = {p.name: ["a red star", "a green star"] for p in pictures}
    flip = {p.name for p in pictures}
    return Dataset(pictures, latents, batch_size=2, seed=0, caption_dropout=0.3, flip=flip, masks=masks, priors=priors)


def frozen(family: ModelFamily, adapters: list[Adapter]) -> Predict:
    def predict(xt: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        with torch.no_grad(), ExitStack() as off:
            for adapter in adapters:
                off.enter_context(adapter.disabled())
            return family.predict(xt, t, cond)

    return predict


def make_run(family: ModelFamily, adapters: list[Adapter], objective: dict[str, Any], optimizer: dict[str, Any]) -> Run:
    components = {adapter.component: adapter.attach(family) for adapter in adapters}
    sections = {name: ComponentOptim.model_validate(optimizer[name]) for name in components}
    args = ObjectiveArgs.model_validate(objective)
    return Run(
        family=family,
        adapters=adapters,
        components=components,
        optimizers={name: build(sections[name], components[name]) for name in components},
        lr={name: Rates(sections[name], 3, component=name) for name in components},
        dataset=make_dataset(family),
        objective=registry.load(OBJECTIVES, args.kind, "objective")(args, family.path, frozen(family, adapters)),
        encode=family.encode,
        hooks=(),
        steps=3,
        accumulate=2,
        max_grad_norm=dict.fromkeys(components, 1.0),
        seed=0,
        engine=CPU(),
    )


Value = tuple[int, str]  # axis, name


def pairs_of(values: Iterable[Value]) -> list[tuple[Value, Value]]:
    return [(one, other) for one, other in combinations(sorted(values), 2) if one[0] != other[0]]


def pairwise(*axes: Iterable[str]) -> list[tuple[str, ...]]:
    """Rows, few of them, so that any two values of different axes meet in one."""
    names = [list(axis) for axis in axes]
    missing = dict.fromkeys(pairs_of((axis, name) for axis, column in enumerate(names) for name in column))
    rows: list[tuple[str, ...]] = []
    while missing:
        row = dict(next(iter(missing)))
        for axis, column in enumerate(names):
            if axis not in row:
                row[axis] = max(
                    column, key=lambda name: sum(p in missing for p in pairs_of([*row.items(), (axis, name)]))
                )
        for pair in pairs_of(row.items()):
            missing.pop(pair, None)
        rows.append(tuple(row[axis] for axis in range(len(names))))
    return rows


ROWS = pairwise(BASES, ADAPTER, OBJECTIVE, OPTIMIZER)


def test_any_two_parts_meet_in_a_row() -> None:
    axes = (BASES, ADAPTER, OBJECTIVE, OPTIMIZER)
    for i, j in combinations(range(4), 2):
        assert {(row[i], row[j]) for row in ROWS} == set(product(axes[i], axes[j]))


@pytest.mark.parametrize(("family", "adapter", "objective", "optimizer"), ROWS, indirect=["family"])
def test_three_steps_equal_one_saved_and_two_resumed(
    family: ModelFamily, adapter: str, objective: str, optimizer: str, tmp_path: Path
) -> None:
    def new() -> Run:
        torch.manual_seed(torch.seed())  # a run that leans on the global generator is found out
        return make_run(
            family,
            make_adapters(ADAPTER[adapter]),
            {**OBJECTIVE, "everything": EVERYTHING}[objective],
            OPTIMIZER[optimizer],
        )

    def leave(run: Run) -> None:
        for part in reversed(run.adapters):
            part.detach()

    whole = new()
    start = tensors(whole)
    expected = [step.loss for step in train(whole)]
    trained = tensors(whole)
    leave(whole)

    first = new()
    losses = [next(train(first)).loss]
    save(tmp_path / "step_000001", 1, first.adapters, first.optimizers)
    leave(first)

    second = new()
    done = load(tmp_path / "step_000001", second.adapters, second.optimizers)
    losses += [step.loss for step in train(second, done)]
    resumed = tensors(second)
    leave(second)

    assert done == 1
    assert losses == expected
    assert equal(resumed, trained)
    for component in whole.components:
        assert any(not torch.equal(start[n], trained[n]) for n, _ in whole.components[component]), component


@pytest.mark.parametrize(
    ("family", "target"),
    [("sdxl" if target == "epsilon" else "sd15-v", target) for target in get_args(Target)],
    indirect=["family"],
)
def test_everything_that_an_objective_can_do_resumes_for_every_target(
    family: ModelFamily, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FlowPath.shifted(shift=3.0) if target == "flow_prediction" else NoisePath(sd_alphas(), target)
    monkeypatch.setattr(family, "path", path)
    test_three_steps_equal_one_saved_and_two_resumed(family, "pivotal", "everything", "adamw", tmp_path)
    terms = {"raw", "weighted", "prior", "prior_weighted", "outside", "outside_weighted", "penalty"}
    run = make_run(family, make_adapters(ADAPTER["pivotal"]), EVERYTHING, OPTIMIZER["adamw"])
    step = next(train(run))
    for part in reversed(run.adapters):
        part.detach()
    assert set(step.terms) == terms
    assert step.terms["raw"] != step.terms["weighted"]


def sd_alphas() -> torch.Tensor:
    """alphas_cumprod of Stable Diffusion 1.5."""
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)


def test_both_targets_are_in_the_matrix(request: pytest.FixtureRequest) -> None:
    paths: list[NoisePath] = [
        registry.load(FAMILIES, name, "family")
        .load(ModelArgs(base=str(request.getfixturevalue(base))), torch.device("cpu"))
        .path
        for name, base in BASES.values()
    ]
    assert [path.target for path in paths] == ["v_prediction", "epsilon", "v_prediction", "epsilon"]
