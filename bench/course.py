"""Whether pictures get worse before they get better: python -m bench.course.

Some schedules wreck the base early in a run and mend it later: a sample at a tenth of the way is worse than before and
after. This scores runs while they train, at chosen shares of the way, by concept and by ordinary prompts, and
writes bench/results/course.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bench.methods import ALONE, PRIOR
from bench.runs import OUT, WORK, Job, machine, work
from trainer import console, sampler
from trainer.args import Section
from trainer.hooks import Context, Hook, presented
from trainer.loop import Run
from trainer.rundir import atomic_write
from trainer.types import Step

AT = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)  # shares of the run
FIGURES = ("fidelity", "alignment_colour", "alignment_background", "alignment_size", "retention", "leak")
PICTURES, ORDINARY = 32, 48
SCHEDULES: dict[str, list[str]] = {
    "default (adaptive pivot)": [],
    "LoRA alone, ten times the rate, cosine": [*ALONE, "--optim.adapter.lr", "1e-2"],
    "rows thirty times as fast, no pivot": [
        *("--optim.adapter.curve", "cosine", "--optim.rows.curve", "cosine", "--optim.rows.lr", "3e-1"),
    ],
    "LoRA alone, ten times the rate, prior kept": [*ALONE, "--optim.adapter.lr", "1e-2", *PRIOR],
}


class Watch(Hook):
    """Scores what the run has learned at each of `AT`, and before the first update, into RUN/course.json."""

    class Options(Section):
        concept: str

    def __init__(self, context: Context, options: Options) -> None:
        super().__init__(context)
        self.concept = options.concept
        self._found: list[dict[str, float]] = []

    def on_start(self, run: Run) -> None:
        from testbed.score import Scorer

        self._scorer = Scorer(self.concept, [Image.open(name).convert("RGB") for name in self.context.pictures])
        self._score(run, 0)

    def on_step(self, run: Run, step: Step) -> None:
        if step.step in {max(1, round(share * run.steps)) for share in AT}:
            self._score(run, step.step)

    def _score(self, run: Run, step: int) -> None:
        from testbed.runs import GUIDANCE, STEPS, of_base

        def draw(prompts: Sequence[str], seeds: Sequence[int], adapted: bool) -> list[Image.Image]:
            if not adapted:
                return list(of_base(self.context.args.model.model_dump_json(), tuple(prompts), tuple(seeds)))
            with presented(run, "samples"):
                return sampler.generate(
                    run.family, prompts, seeds=seeds, steps=STEPS, guidance=GUIDANCE, adapters=run.adapters
                )

        scores = self._scorer.score(draw, PICTURES, ORDINARY).rows()
        self._found.append({"step": step, **{name: round(scores[name], 4) for name in FIGURES}})
        atomic_write(self.context.dir.root / "course.json", json.dumps(self._found))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.course", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--preset", default="presets/quickstart.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, a thread each")
    parser.add_argument("--work", type=Path, default=WORK, help="what finished runs scored")
    parser.add_argument("--out", type=Path, default=OUT / "course.json")
    args = parser.parse_args()
    console.hush_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    watched = json.dumps([{"use": "bench/course.py:Watch", "options": {"concept": args.concept}}])
    jobs = {
        (name, seed): Job(
            args.concept,
            args.preset,
            (*options, "--hooks.extra", watched, "--sample.every", "0"),
            seed,
            args.work.resolve(),
            None,
            file="course.json",
        )
        for name, options in SCHEDULES.items()
        for seed in range(args.seeds)
    }
    done = work(list(jobs.values()), args.jobs)
    results: dict[str, Any] = {
        "concept": args.concept,
        "preset": args.preset,
        "machine": machine(args.jobs),
        "pictures": PICTURES,
        "ordinary": ORDINARY,
        "schedules": {
            name: {
                "options": options,
                "runs": [{"seed": seed, "course": done[jobs[name, seed]]["kept"]} for seed in range(args.seeds)],
            }
            for name, options in SCHEDULES.items()
        },
    }
    atomic_write(args.out, json.dumps(results, indent=2) + "\n")
    print(table(results))
    return 0


def table(results: dict[str, Any]) -> str:
    """Markdown: for each schedule the mean over seeds at each step."""
    lines: list[str] = []
    for name, schedule in results["schedules"].items():
        courses = [run["course"] for run in schedule["runs"]]
        seeds = f"{len(courses)} seed{'s' if len(courses) > 1 else ''}"
        steps = [point["step"] for point in courses[0]]
        lines += [
            f"| {name}; {seeds} | " + " | ".join(f"step {step}" for step in steps) + " |",
            "|" + "---|" * (len(steps) + 1),
        ]
        for figure in FIGURES:
            means = [statistics.fmean(course[i][figure] for course in courses) for i in range(len(steps))]
            lines.append(f"| {figure.replace('_', ' ')} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
