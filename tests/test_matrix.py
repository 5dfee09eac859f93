"""Family x adapter x objective x optimizer: three steps, and the same three with a save and a load between.

Not the whole product, which grows with every part: any two parts meet in at least one row of tests/cells.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cells import (
    ADAPTER,
    AXES,
    BASES,
    EVERY_TARGET,
    EVERYTHING,
    OBJECTIVE,
    OPTIMIZER,
    PAGE,
    PRECISION,
    ROWS,
    SOME,
    TARGETS,
    page,
)
from small import equal, items, tensors

from trainer import registry, sampler
from trainer.adapters import ADAPTERS
from trainer.adapters.textual_inversion import Concept, TextualInversion
from trainer.args import (
    CURVES,
    PIVOTS,
    AdapterArgs,
    ComponentOptim,
    ModelArgs,
    ObjectiveArgs,
    RuntimeArgs,
    TextArgs,
)
from trainer.checkpoint import load, save
from trainer.dataset import Dataset
from trainer.engine import Engine
from trainer.loop import Run, train
from trainer.models import FAMILIES
from trainer.objectives import OBJECTIVES
from trainer.optim import OPTIMIZERS, Rates, build
from trainer.path import FlowPath, NoisePath, Target
from trainer.types import Adapter, Cond, HasScales, ModelFamily, Predict
from trainer.view import label


def test_the_matrix_has_a_row_for_every_part() -> None:
    assert {family for family, _ in BASES.values()} == set(FAMILIES)
    assert {row["adapter"]["kind"] for row in ADAPTER.values() if "adapter" in row} == set(ADAPTERS)
    assert {row["kind"] for row in OBJECTIVE.values()} == set(OBJECTIVES)
    used = {section.get("name", "adamw") for row in OPTIMIZER.values() for section in row.values()}
    assert used <= set(OPTIMIZERS)  # the loop tells optimizers apart by their averages alone; test_optim.py has each
    curves = {section.get("curve", "constant") for row in OPTIMIZER.values() for section in row.values()}
    halves = {"pivot_rows", "pivot_adapter"}  # of adaptive
    assert curves == {*CURVES, *PIVOTS} - halves - {"rex"}  # pure functions; test_curves.py has each
    assert get_args(Target) == TARGETS
    targets = {row.get("adapter", {}).get("targets", "attention") for row in {**ADAPTER, **SOME}.values()}
    assert targets == set(get_args(AdapterArgs.model_fields["targets"].annotation))
    options = {name for row in {**ADAPTER, **SOME}.values() for name in row.get("adapter", {})}
    elsewhere = {"match", "ranks", "alphas", "bias", "start"}  # test_target_layers.py, test_run_adapters.py
    assert options == set(AdapterArgs.model_fields) - elsewhere


def test_the_page_is_that_of_the_rows() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/cells.py"


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> ModelFamily:
    """The family of a base and a precision, loaded once: adapters leave it as it was."""
    name, base = BASES[request.param[0]]
    path: Path = request.getfixturevalue(base)
    args = ModelArgs(base=str(path), **PRECISION[request.param[1]])
    family: ModelFamily = registry.load(FAMILIES, name, "family").load(args, torch.device("cpu"))
    if args.quantise != "none":
        family.quantise()
    return family


def make_adapters(row: dict[str, Any]) -> list[Adapter]:
    adapters: list[Adapter] = []
    if "text" in row:
        concepts = [Concept(trigger) for trigger in row.get("triggers", ["TOK"])]
        adapters.append(TextualInversion(TextArgs.model_validate(row["text"]), concepts, 0))
    if "adapter" in row:
        args = AdapterArgs.model_validate(row["adapter"])
        adapters.append(registry.load(ADAPTERS, args.kind, "adapter")(args, 0))
        if args.text.train:
            adapters.append(registry.load(ADAPTERS, args.kind, "adapter")(args.for_text(), 1, "text"))
    return adapters


def make_dataset(family: ModelFamily) -> Dataset:
    side = family.resolution
    pictures = items([(side, side)] * 3 + [(side * 2, side)] * 2)
    pictures[1::2] = [
        replace(p, caption=f"{p.caption} and a {p.caption.replace('TOK', 'CAT')}") for p in pictures[1::2]
    ]
    generator = torch.Generator().manual_seed(0)
    scale, dtype = family.latent_scale, next(family.denoiser.parameters()).dtype
    latents = {
        p.name: torch.randn(4, p.bucket[1] // scale, p.bucket[0] // scale, generator=generator).to(dtype)
        for p in pictures
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


def make_run(
    family: ModelFamily, adapters: list[Adapter], objective: dict[str, Any], optimizer: dict[str, Any], dtype: str
) -> Run:
    components = {adapter.component: adapter.attach(family) for adapter in adapters}
    engine = Engine(RuntimeArgs.model_validate({"device": "cpu"}), dtype)
    for _, parameter in (pair for named in components.values() for pair in named):
        engine.watch(parameter)
    scales = {
        a.component: {n: a.lr_scale(n) for n, _ in components[a.component]}
        for a in adapters
        if isinstance(a, HasScales)
    }
    sections = {name: ComponentOptim.model_validate({"lr": 1e-3, **optimizer[name]}) for name in components}
    args = ObjectiveArgs.model_validate(objective)
    return Run(
        family=family,
        adapters=adapters,
        components=components,
        optimizers={name: build(sections[name], components[name], scales.get(name)) for name in components},
        lr={name: Rates(sections[name], 3, component=name) for name in components},
        dataset=make_dataset(family),
        objective=registry.load(OBJECTIVES, args.kind, "objective")(args, family.path, frozen(family, adapters)),
        encode=family.encode,
        hooks=(),
        steps=3,
        accumulate=2,
        max_grad_norm=dict.fromkeys(components, 1.0),
        seed=0,
        engine=engine,
    )


def test_any_two_parts_meet_in_a_row() -> None:
    for i, j in combinations(range(len(AXES)), 2):
        at = [0, 2, 3, 4]  # a row has its precision second
        assert {(row[at[i]], row[at[j]]) for row in ROWS} >= set(product(AXES[i], AXES[j]))
    assert {(row[0], row[1]) for row in ROWS} == set(product(BASES, PRECISION))
    parts = {**ADAPTER, **SOME}
    half = {parts[row[2]]["adapter"]["kind"] for row in ROWS if row[1] != "fp32" and "adapter" in parts[row[2]]}
    assert half == set(ADAPTERS)
    assert {row[2] for row in ROWS} == {*ADAPTER, *SOME}


def memories(run: Run) -> dict[str, torch.Tensor]:
    """Copies of the numbers that the optimizers would go on with after the last step."""
    found: dict[str, torch.Tensor] = {}
    for component, optimizer in run.optimizers.items():
        tree = optimizer.state_dict()
        groups = {f"group {i}": group for i, group in enumerate(tree["param_groups"])}
        for number, values in {**tree["state"], **groups}.items():
            numbers = {name: v for name, v in values.items() if isinstance(v, torch.Tensor | float | int)}
            found |= {f"{component} {number} {name}": torch.as_tensor(v).clone() for name, v in numbers.items()}
    return found


def drawn(family: ModelFamily) -> bytes:
    """A picture of the trigger with what is attached; these families' pipelines draw along no flow."""
    if family.path.target == "flow_prediction":
        return b"no picture"
    (picture,) = sampler.generate(family, ["a red TOK"], seeds=[0], steps=2, guidance=2.0)
    return picture.tobytes()


def leave(run: Run) -> None:
    for part in reversed(run.adapters):
        part.detach()
    assert isinstance(run.engine, Engine)
    run.engine.release()


@pytest.mark.parametrize(
    ("family", "dtype", "adapter", "objective", "optimizer"),
    [((base, precision), precision, *rest) for base, precision, *rest in ROWS],
    indirect=["family"],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_three_steps_equal_one_saved_and_two_resumed(
    family: ModelFamily, dtype: str, adapter: str, objective: str, optimizer: str, tmp_path: Path
) -> None:
    def new() -> Run:
        torch.manual_seed(torch.seed())  # a run that leans on the global generator is found out
        return make_run(
            family,
            make_adapters({**ADAPTER, **SOME}[adapter]),
            {**OBJECTIVE, "everything": EVERYTHING}[objective],
            OPTIMIZER[optimizer],
            dtype,
        )

    whole = new()
    start = tensors(whole)
    expected = [step.loss for step in train(whole)]
    trained, remembered, picture = tensors(whole), memories(whole), drawn(family)
    leave(whole)

    first = new()
    losses = [next(train(first)).loss]
    save(tmp_path / "step_000001", 1, first.adapters, first.optimizers)
    leave(first)

    second = new()
    done = load(tmp_path / "step_000001", second.adapters, second.optimizers)
    losses += [step.loss for step in train(second, done)]
    resumed, kept, again = tensors(second), memories(second), drawn(family)
    leave(second)

    assert done == 1
    assert losses == expected
    assert equal(resumed, trained)
    assert equal(kept, remembered)
    assert again == picture
    assert len(set(picture)) > 1
    for component in whole.components:
        assert any(not torch.equal(start[n], trained[n]) for n, _ in whole.components[component]), component


@pytest.mark.parametrize(
    ("family", "target"), [((base, "fp32"), target) for base, target in EVERY_TARGET], indirect=["family"], ids=str
)
def test_everything_that_an_objective_can_do_resumes_for_every_target(
    family: ModelFamily, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FlowPath.shifted(shift=3.0) if target == "flow_prediction" else NoisePath(sd_alphas(), target)
    monkeypatch.setattr(family, "path", path)
    test_three_steps_equal_one_saved_and_two_resumed(family, "fp32", "pivotal", "everything", "adamw", tmp_path)
    terms = {"raw", "weighted", "prior", "prior_weighted", "outside", "outside_weighted", "penalty"}
    run = make_run(family, make_adapters(ADAPTER["pivotal"]), EVERYTHING, OPTIMIZER["adamw"], "fp32")
    step = next(train(run))
    leave(run)
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
