"""The bench's arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bench import methods, quality, runs, sweep


def _run(concept: str, seed: int, fidelity: float) -> dict[str, Any]:
    return {"concept": concept, "seed": seed, "fidelity": fidelity}


def test_a_difference_is_paired_and_has_the_interval_of_students_t() -> None:
    before = [_run("cat", 0, 0.5), _run("cat", 1, 0.9), _run("fish", 0, 0.7)]
    after = [_run("fish", 0, 0.8), _run("cat", 0, 0.55), _run("cat", 1, 1.0)]  # in another order
    middle, half = quality.difference(before, after, "fidelity")
    test = stats.ttest_rel([0.55, 1.0, 0.8], [0.5, 0.9, 0.7])
    interval = test.confidence_interval(0.95)
    assert (middle - half, middle + half) == pytest.approx((interval.low, interval.high))
    assert quality.difference(before[:1], after[1:2], "fidelity") == (pytest.approx(0.05), math.inf)


def test_differences_are_told_apart_by_kind() -> None:
    figures = dict.fromkeys(quality.COMPARED, 0.5)

    def of(fidelity: dict[str, float]) -> dict[str, Any]:
        return {
            "runs": [{**figures, "concept": c, "seed": s, "fidelity": f} for c, f in fidelity.items() for s in (0, 1)]
        }

    first, second = of({"cat": 0.5, "ripple": 0.1}), of({"cat": 0.4, "ripple": 0.3})
    shown = quality.by_kind({"tables": {"some": {"a": first, "b": second}}}, "some").splitlines()
    assert shown[0].startswith("| points from a | of | pairs | fidelity |")
    assert shown[2].startswith("| b | shapes | 2 | -10.0 ± 0.0 | +0.0 ± 0.0 |")
    assert shown[3].startswith("| b | fills | 2 | +20.0 ± 0.0 |")
    assert len(shown) == 4


def test_tables_of_the_same_methods_are_taken_together() -> None:
    figures = dict.fromkeys(quality.COMPARED, 0.5)

    def of(*fidelity: float) -> dict[str, Any]:
        return {"runs": [{**figures, "concept": "cat", "seed": s, "fidelity": f} for s, f in enumerate(fidelity)]}

    tables = {"calm": {"a": of(0.5, 0.6), "b": of(0.5, 0.6)}, "hot": {"a": of(0.1, 0.2), "b": of(0.3, 0.4)}}
    shown = quality.together({"tables": tables}).splitlines()
    half = stats.t.ppf(0.975, 3) * np.std([0, 0, 20, 20], ddof=1) / 2
    assert shown[2].startswith(f"| b | 4 | +10.0 ± {half:.1f} | +0.0 ± 0.0 |")
    assert len(shown) == 3


def test_overall_is_the_harmonic_mean_of_four_that_count_up_to_one() -> None:
    run = {"fidelity": 0.5, "retention": 1.02, "diversity": 0.25}
    aligned = {"alignment_colour": 1.0, "alignment_background": 0.9, "alignment_size": 0.5}
    assert quality.overall({**run, **aligned}) == pytest.approx(4 / (1 / 0.5 + 1 / 0.8 + 1 + 1 / 0.25))


def test_methods_are_commands_that_train_py_understands(tmp_path: Path) -> None:
    options = {tuple(list(table.values())[-1]) for table in methods.TABLES.values()}  # the bench itself checks them all
    made = [runs.Job("cat", "presets/quickstart.json", o, 0, tmp_path, None) for o in options]
    runs.check(made)
    with pytest.raises(ValueError, match="rnak"):
        runs.check([runs.Job("cat", "presets/quickstart.json", ("--adapter.rnak", "3"), 0, tmp_path, None)])


def test_what_is_in_the_work_folder_is_not_made_again(tmp_path: Path) -> None:
    few = runs.Job("cat", "presets/quickstart.json", ("--pictures", "4", "--adapter.rank", "4"), 0, tmp_path, None)
    runs.check([few])  # train.py is not told
    assert few.pictures == 4
    job = runs.Job("cat", "presets/quickstart.json", (), 0, tmp_path, None)
    assert job.pictures == 10
    job.scores.write_text('{"concept": "cat", "seed": 0, "fidelity": 0.25}', encoding="utf-8")
    assert runs.work([job], 1)[job]["fidelity"] == 0.25
    other = runs.Job("cat", "presets/quickstart.json", ("--adapter.rank", "4"), 0, tmp_path, None)
    assert other.scores != job.scores


def test_runs_of_earlier_results_count_as_made(tmp_path: Path) -> None:
    run = {"concept": "cat", "seed": 1, "fidelity": 0.25, "overall": 0.5}
    method = {"options": ["--adapter.rank", "4"], "runs": [run]}
    results = {"preset": "presets/object.json", "tables": {"some": {"rank 4": method}}}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results), encoding="utf-8")
    runs.adopt(file, tmp_path)
    job = runs.Job("cat", "presets/object.json", ("--adapter.rank", "4"), 1, tmp_path, None)
    assert runs.work([job], 1) == {job: {"concept": "cat", "seed": 1, "fidelity": 0.25}}
    job.scores.write_text('{"fidelity": 0.75}', encoding="utf-8")
    runs.adopt(file, tmp_path)
    assert runs.work([job], 1)[job]["fidelity"] == 0.75  # what was made here counts more
    for other in ("presets/style.json", "presets/object.json"):
        assert not runs.Job("cat", other, ("--adapter.rank", "8"), 1, tmp_path, None).scores.exists()


def _pretended(job: runs.Job) -> dict[str, Any]:
    """A run that is the better, the nearer its rank is to 8 and its rate to 1e-3."""
    args = json.loads(Path(job.preset).read_text(encoding="utf-8"))
    if args["optim"]["adapter"]["lr"] > 1:
        raise RuntimeError("the loss is not finite")
    good = 1 / (1 + abs(args["adapter"]["rank"] - 8) + abs(math.log10(args["optim"]["adapter"]["lr"]) + 3))
    shares = dict.fromkeys(("fidelity", "retention", "diversity"), good)
    aligned = {f"alignment_{name}": good for name in ("colour", "background", "size")}
    return {"concept": job.concept, "seed": job.seed, **shares, **aligned}


SWEEP: dict[str, Any] = {
    "space": {"adapter.rank": [4, 8], "optim.adapter.lr": [1e-3, 10.0]},
    "concepts": ["cat", "fish"],
    "seeds": 2,
    "sampler": "grid",
}


def test_a_sweep_finds_the_best_goes_on_where_it_stopped_and_leaves_out_what_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sweep.Sweep.model_validate({**SWEEP, "trials": 1})
    calls: list[runs.Job] = []

    def runner(job: runs.Job) -> dict[str, Any]:
        calls.append(job)
        return _pretended(job)

    sweep.search(made, tmp_path, runner)
    first = len(calls)
    sweep.search(made, tmp_path, runner)
    assert len(calls) == first, "there were enough"
    sweep.search(made.model_copy(update={"trials": 20}), tmp_path, runner)  # a grid ends by itself
    assert len(calls) == 2 * 2 * 2 + 2, "each of the grid once; a failing trial stops at its first run"
    assert "the loss is not finite" in capsys.readouterr().err
    said = sweep.write(made, tmp_path)
    assert said.splitlines()[2].startswith("| 1.000 | 8 | 0.001 |")
    best = json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))
    assert (best["adapter"]["rank"], best["optim"]["adapter"]["lr"]) == (8, 1e-3)
    assert best["text"]["tokens"] == 2, "the rest is the preset's"
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))) == 2
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"space": {"adapter.rnak": [1, 2]}}, "adapter.rnak, and there is no such option"),
        ({"space": {}}, "nothing to choose from"),
        ({"sampler": "grid", "space": {"optim.adapter.lr": {"low": 1e-4, "high": 1e-2}}}, "needs lists"),
        ({"space": {"adapter.rank": {"low": 9, "high": 3}}}, "must be below"),
        ({"space": {"optim.adapter.lr": {"low": 0, "high": 1, "log": True}}}, "no logarithm"),
        ({"concepts": ["dragon"], "space": {"adapter.rank": [1]}}, "no held-out concept dragon"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(
    given: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    with pytest.raises(SystemExit):
        sweep.main([str(file), "--out", str(tmp_path / "out")])
    assert said in capsys.readouterr().err
