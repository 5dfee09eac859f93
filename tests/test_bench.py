"""The bench's arithmetic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from bench import methods, quality, runs


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


def test_overall_is_the_harmonic_mean_of_four_that_count_up_to_one() -> None:
    run = {"fidelity": 0.5, "retention": 1.02, "diversity": 0.25}
    aligned = {"alignment_colour": 1.0, "alignment_background": 0.9, "alignment_size": 0.5}
    assert quality.overall({**run, **aligned}) == pytest.approx(4 / (1 / 0.5 + 1 / 0.8 + 1 + 1 / 0.25))


def test_every_method_is_a_command_that_train_understands(tmp_path: Path) -> None:
    options = {tuple(o) for table in methods.TABLES.values() for o in table.values()}
    made = [runs.Job("cat", "presets/quickstart.json", o, 0, tmp_path, None) for o in options]
    runs.check(made)
    with pytest.raises(ValueError, match="rnak"):
        runs.check([runs.Job("cat", "presets/quickstart.json", ("--adapter.rnak", "3"), 0, tmp_path, None)])


def test_what_is_in_the_work_folder_is_not_made_again(tmp_path: Path) -> None:
    job = runs.Job("cat", "presets/quickstart.json", (), 0, tmp_path, None)
    job.scores.write_text('{"concept": "cat", "seed": 0, "fidelity": 0.25}', encoding="utf-8")
    assert runs.work([job], 1)[job]["fidelity"] == 0.25
    other = runs.Job("cat", "presets/quickstart.json", ("--adapter.rank", "4"), 0, tmp_path, None)
    assert other.scores != job.scores
