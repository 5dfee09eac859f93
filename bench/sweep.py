"""The best options for a budget, searched for: python -m bench.quality sweep SWEEP.json --workers 2.

A sweep file says what is tried and on what (`Sweep`). Each trial trains every concept with every seed and budget of
steps, and its value is the mean of `bench.quality.overall`. Optuna keeps the trials in a journal in the output folder,
so that a sweep which was stopped goes on, and that other machines which share the folder join it with the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback, Study
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import Field, ValidationError, model_validator
from tqdm import tqdm

from bench.quality import overall
from bench.runs import ROOT, Job, check, one, scored
from testbed.concepts import CONCEPTS
from trainer import cli, console
from trainer.args import Section
from trainer.rundir import atomic_write

Scalar = bool | int | float | str
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
PRESET = "preset"  # the parameter that says which of several args files a trial starts from


class Range(Section):
    """Numbers between two; whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="search evenly in the logarithm")

    @model_validator(mode="after")
    def _rises(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, which has no logarithm")
        return self


class Sweep(Section):
    """What a sweep file holds."""

    presets: tuple[str, ...] = Field(("presets/quickstart.json",), min_length=1, description="args files to start from")
    space: dict[str, Range | tuple[Scalar, ...]] = Field(
        default_factory=dict[str, Range | tuple[Scalar, ...]],
        description="option -> a list of values, or a range {low, high, log}",
    )
    concepts: tuple[str, ...] = Field(("mushroom", "cat"), min_length=1, description="held-out concepts")
    seeds: int = Field(3, ge=1, description="training seeds of each concept")
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="budgets of updates [default: the preset's]")
    trials: int = Field(20, ge=1, description="trials after which the sweep ends; a grid ends by itself")
    sampler: Literal["tpe", "random", "grid"] = Field("tpe", description="how values are chosen")

    @model_validator(mode="after")
    def _searches(self) -> Sweep:
        if not self.space and len(self.presets) == 1:
            raise ValueError("there is nothing to choose from: give space, or several presets")
        if self.sampler == "grid" and any(isinstance(values, Range) for values in self.space.values()):
            raise ValueError("sampler is grid, which needs lists of values, and space has a range")
        if unknown := sorted({*self.space} - {*cli.options()}):
            raise ValueError(f"space names {', '.join(unknown)}, and there is no such option")
        if unknown := sorted({*self.concepts} - {*CONCEPTS}):
            raise ValueError(f"there is no held-out concept {', '.join(unknown)}; there are {', '.join(CONCEPTS)}")
        return self

    @property
    def choices(self) -> dict[str, list[Scalar]]:
        """Every parameter that has a list of values."""
        lists = {name: list(values) for name, values in self.space.items() if not isinstance(values, Range)}
        return {**({PRESET: list(self.presets)} if len(self.presets) > 1 else {}), **lists}

    def sampled(self) -> optuna.samplers.BaseSampler:
        if self.sampler == "grid":
            return optuna.samplers.GridSampler(self.choices)
        return optuna.samplers.TPESampler() if self.sampler == "tpe" else optuna.samplers.RandomSampler()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="the sweep, as JSON")
    parser.add_argument("--workers", type=int, default=1, help="trials at the same time on this machine")
    parser.add_argument("--out", type=Path, help="[default: bench/work/NAME]")
    options = parser.parse_args(argv)
    console.hush_libraries()
    try:
        sweep = Sweep.model_validate_json(options.file.read_text(encoding="utf-8"))
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        parser.error(f"{options.file}: {error}")
    out: Path = (options.out or ROOT / "bench" / "work" / options.file.stem).resolve()
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "sweep.json"
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) != sweep.model_dump(mode="json"):
        parser.error(f"{out} holds another sweep; give --out another folder, or {options.file} as it was")
    atomic_write(kept, json.dumps(sweep.model_dump(mode="json"), indent=2) + "\n")
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=search, args=(sweep, out), daemon=False) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    _watch(sweep, out, workers)
    if any(worker.exitcode for worker in workers):
        print(f"a worker failed, see above; the same command goes on from what is in {out}", file=sys.stderr)
        return 1
    print(write(sweep, out))
    return 0


def search(sweep: Sweep, out: Path, runner: Callable[[Job], Mapping[str, Any]] = one) -> None:
    """One worker: makes trials until there are enough."""
    optuna.logging.set_verbosity(logging.WARNING)
    study = opened(sweep, out)

    def value(trial: Trial) -> float:
        params = chosen(sweep, trial)
        try:
            found = [scored(job, runner) for job in jobs(sweep, params, out)]
        except (cli.CommandError, RuntimeError) as error:  # of a run that failed the others say nothing
            print(f"trial {trial.number} ({params}) is left out: {error}", file=sys.stderr)
            raise optuna.TrialPruned from error
        trial.set_user_attr("runs", found)
        return statistics.fmean(overall(run) for run in found)

    if len(study.get_trials(deepcopy=False, states=ENDED)) < sweep.trials:
        study.optimize(value, callbacks=[MaxTrialsCallback(sweep.trials, states=ENDED)])


def opened(sweep: Sweep, out: Path) -> Study:
    """The study in the folder, which is made if there is none."""
    storage = JournalStorage(JournalFileBackend(str(out / "journal.log")))
    return optuna.create_study(
        study_name="sweep", storage=storage, sampler=sweep.sampled(), direction="maximize", load_if_exists=True
    )


def chosen(sweep: Sweep, trial: Trial) -> dict[str, Scalar]:
    """The values of a trial, by option."""
    params: dict[str, Scalar] = {name: trial.suggest_categorical(name, v) for name, v in sweep.choices.items()}
    for name, span in sweep.space.items():
        if isinstance(span, Range):
            whole = isinstance(span.low, int) and isinstance(span.high, int)
            suggest: Any = trial.suggest_int if whole else trial.suggest_float
            params[name] = suggest(name, span.low, span.high, log=span.log)
    return params


def jobs(sweep: Sweep, params: Mapping[str, Scalar], out: Path) -> list[Job]:
    """The runs of one choice of values, each with its args file in the folder."""
    digest = hashlib.sha256(json.dumps(dict(params), sort_keys=True).encode()).hexdigest()[:10]
    path = out / "args" / f"{digest}.json"
    atomic_write(path, json.dumps(tree(sweep, params), indent=2) + "\n")
    budgets = [("--runtime.steps", str(steps)) for steps in sweep.steps] or [()]
    every = [
        Job(concept, str(path), tuple(budget), seed, out, None)
        for concept in sweep.concepts
        for budget in budgets
        for seed in range(sweep.seeds)
    ]
    check(every[:1])
    return every


def tree(sweep: Sweep, params: Mapping[str, Scalar]) -> cli.Tree:
    """The args of one choice of values, as train.py reads them from a file."""
    base = Path(str(params.get(PRESET, sweep.presets[0])))
    layers: list[cli.Tree] = [json.loads((base if base.is_absolute() else ROOT / base).read_text(encoding="utf-8"))]
    for name, value in params.items():
        if name != PRESET:
            *sections, leaf = name.split(".")
            layer: cli.Tree = {leaf: value}
            for section in reversed(sections):
                layer = {section: layer}
            layers.append(layer)
    return cli.merge(layers)


def _finished(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _watch(sweep: Sweep, out: Path, workers: Sequence[Any]) -> None:
    """A bar of finished trials while the workers work."""
    study = opened(sweep, out)
    with tqdm(total=sweep.trials, desc="trials", unit="trial") as bar:
        while any(worker.is_alive() for worker in workers):
            time.sleep(1)
            bar.update(min(len(study.get_trials(deepcopy=False, states=ENDED)), sweep.trials) - bar.n)


def write(sweep: Sweep, out: Path) -> str:
    """Writes results.json, results.png and best.json into the folder; the table, best first."""
    study = opened(sweep, out)
    trials = sorted(_finished(study), key=lambda trial: -(trial.value or 0.0))
    if not trials:
        return "no trial could be finished, see above"
    results = [{"value": t.value, "params": t.params, "runs": t.user_attrs["runs"]} for t in trials]
    atomic_write(out / "results.json", json.dumps(results, indent=2) + "\n")
    best = tree(sweep, trials[0].params)
    best["data"] = {name: value for name, value in best.get("data", {}).items() if name != "source"}
    atomic_write(out / "best.json", json.dumps(best, indent=2) + "\n")
    if len(trials) > 1:
        _plot(study, out / "results.png")
    names = [*sweep.choices, *(name for name in sweep.space if name not in sweep.choices)]
    lines = ["| overall | " + " | ".join(names) + " | fidelity | retention |", "|" + "---|" * (len(names) + 3)]
    for trial in trials:
        runs = trial.user_attrs["runs"]
        figures = [statistics.fmean(run[key] for run in runs) for key in ("fidelity", "retention")]
        cells = [
            *(f"{trial.params[n]:.3g}" if isinstance(trial.params[n], float) else str(trial.params[n]) for n in names)
        ]
        lines.append(f"| {trial.value:.3f} | " + " | ".join([*cells, *(f"{f:.2f}" for f in figures)]) + " |")
    return "\n".join([*lines, "", f"the best args: {out / 'best.json'}", f"every run: {out / 'results.json'}"])


def _plot(study: Study, path: Path) -> None:
    """The value over each parameter, by Optuna's own plot."""
    import warnings

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.visualization.matplotlib.plot_slice(study, target_name="overall")
    beside = path.with_name(f".{path.name}")
    pyplot.gcf().savefig(beside, format="png", dpi=110, bbox_inches="tight")
    pyplot.close("all")
    beside.replace(path)
