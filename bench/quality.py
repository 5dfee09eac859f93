"""How well held-out concepts are learned on the shipped base: python -m bench.quality.

Trains every method of the chosen tables (bench/methods.py) on every concept with every seed, scores each run from its
exported files, and writes one JSON with every single figure, the means and the spread. A run whose scores are in the
work folder is not made again, so that a bench that was stopped goes on; nor is one of an earlier bench, of which the
results are given.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from bench.methods import TABLES
from bench.runs import OUT, WORK, Job, adopt, before, machine, work
from testbed.concepts import CONCEPTS
from trainer import console
from trainer.rundir import atomic_write

SHOWN = (
    "fidelity",
    "alignment_colour",
    "alignment_background",
    "alignment_size",
    "retention",
    "leak",
    "diversity",
    "copies",
)
BEST, LOOKS = "--hooks.best.pictures", "choice.json"  # the option, and where it says what it saw
COMPARED = ("fidelity", "alignment_size", "retention", "leak", "diversity", "overall")


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["sweep"]:
        from bench import sweep  # which reads scores as this does

        return sweep.main(words[1:])
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="Quality of methods, in tables.")
    parser.add_argument("--concepts", nargs="*", default=["mushroom"], help="held-out ones of the testbed")
    parser.add_argument("--preset", default="presets/quickstart.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", nargs="*", choices=list(TABLES), default=["quickstart"])
    parser.add_argument("--methods", nargs="*", help="only these of the tables")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, a thread each")
    parser.add_argument("--work", type=Path, default=WORK, help="what finished runs scored")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="results whose runs are not made again")
    parser.add_argument("--keep", type=Path, help="folder that gets a copy of every run")
    parser.add_argument("--out", type=Path, default=OUT / "quality.json")
    parser.add_argument(
        "--quick", action="store_true", help="one seed of two methods: minutes, to see that all is well"
    )
    args = parser.parse_args(words)
    if args.quick:
        args.seeds, args.tables, args.methods = 1, ["quickstart"], ["pivotal", "LoRA alone"]
        args.out = args.work / "quick.json" if args.out == OUT / "quality.json" else args.out
    console.hush_libraries()
    known = {method for table in args.tables for method in TABLES[table]}
    if unknown := sorted(set(args.methods or ()) - known):
        parser.error(f"no table of {', '.join(args.tables)} has {', '.join(unknown)}; they have {', '.join(known)}")
    args.work.mkdir(parents=True, exist_ok=True)
    for earlier in args.known:
        adopt(earlier, args.work.resolve())
    chosen = {
        table: {name: options for name, options in TABLES[table].items() if not args.methods or name in args.methods}
        for table in args.tables
    }
    every = [_jobs(args, options) for methods in chosen.values() for options in methods.values()]
    done = work(sorted({job for jobs in every for job in jobs}, key=lambda job: job.seed), args.jobs)
    results: dict[str, Any] = {
        "concepts": args.concepts,
        "preset": args.preset,
        "machine": machine(args.jobs),
        "before": mean([before(concept, args.preset, args.work) for concept in args.concepts]),
        "tables": {
            table: {
                name: summary(options, [done[job] for job in _jobs(args, options)]) for name, options in methods.items()
            }
            for table, methods in chosen.items()
        },
    }
    atomic_write(args.out, json.dumps(results, indent=2) + "\n")
    for name in chosen:
        print(f"\n{name}\n\n{table(results, name)}\n\n{differences(results, name)}")
    return 0


def _jobs(args: argparse.Namespace, options: Sequence[str]) -> list[Job]:
    """The runs of a method."""
    file = LOOKS if BEST in options else None
    return [
        Job(concept, args.preset, tuple(options), seed, args.work.resolve(), args.keep, file)
        for concept in args.concepts
        for seed in range(args.seeds)
    ]


def summary(options: Sequence[str], runs: list[dict[str, Any]]) -> dict[str, Any]:
    runs = [{**run, "overall": round(overall(run), 4)} for run in runs]
    figures = [k for k in runs[0] if k not in ("concept", "seed", "n", "kept")]
    return {
        "options": list(options),
        "mean": mean([{k: run[k] for k in figures} for run in runs]),
        "spread": {k: round(max(r[k] for r in runs) - min(r[k] for r in runs), 4) for k in figures},
        "runs": runs,
    }


def mean(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {k: round(statistics.fmean(run[k] for run in runs), 4) for k in runs[0]}


def overall(run: dict[str, float]) -> float:
    """The harmonic mean of fidelity, alignment (the mean of its three), retention and diversity, each at most 1."""
    alignment = statistics.fmean(run[f"alignment_{name}"] for name in ("colour", "background", "size"))
    parts = [min(1.0, part) for part in (run["fidelity"], alignment, run["retention"], run["diversity"])]
    return statistics.harmonic_mean(parts)


def table(results: dict[str, Any], name: str) -> str:
    """Markdown: mean and, in brackets, lowest..highest over concepts and seeds."""
    heads = ["", *[key.replace("_", " ") for key in SHOWN], "train.py, s"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines.append("| before training | " + " | ".join(f"{results['before'][k]:.2f}" for k in SHOWN) + " | |")
    for method, result in results["tables"][name].items():
        cells = [_cell([run[key] for run in result["runs"]]) for key in SHOWN]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {result['mean']['train_process_s']:.0f} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    middle, lowest, highest = (f"{v:.2f}" for v in (statistics.fmean(values), min(values), max(values)))
    return middle if lowest == highest else f"{middle} ({lowest}..{highest})"


def differences(results: dict[str, Any], name: str) -> str:
    """Markdown: each method less the first of its table, in points, paired by concept and seed."""
    (reference, first), *others = results["tables"][name].items()
    heads = [f"points from {reference}", *[key.replace("_", " ") for key in COMPARED]]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method, result in others:
        cells = [_points(*difference(first["runs"], result["runs"], key)) for key in COMPARED]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_kind(results: dict[str, Any], name: str) -> str:
    """Markdown: the same for shapes, fills and styles apart."""
    (reference, first), *others = results["tables"][name].items()
    heads = [f"points from {reference}", "of", "pairs", *[key.replace("_", " ") for key in COMPARED]]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method, result in others:
        for kind in dict.fromkeys(CONCEPTS[run["concept"]].kind for run in result["runs"]):
            runs = [run for run in result["runs"] if CONCEPTS[run["concept"]].kind == kind]
            cells = [_points(*difference(first["runs"], runs, key)) for key in COMPARED]
            lines.append(f"| {method} | {kind}s | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def together(results: dict[str, Any]) -> str:
    """Markdown: the same over all tables, which have the same methods, each table's pairs beside the others'."""
    tables = results["tables"]
    reference, *others = next(iter(tables.values()))

    def every(method: str) -> list[dict[str, Any]]:
        each = [(name, run) for name, methods in tables.items() for run in methods[method]["runs"]]
        return [{**run, "concept": (name, run["concept"])} for name, run in each]

    heads = [f"points from {reference}", "pairs", *[key.replace("_", " ") for key in COMPARED]]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method in others:
        cells = [_points(*difference(every(reference), every(method), key)) for key in COMPARED]
        lines.append(f"| {method} | {len(every(method))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _points(middle: float, half: float) -> str:
    return f"{100 * middle:+.1f} ± {100 * half:.1f}"


def difference(reference: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    """Of runs paired by concept and seed: the mean of run - reference, and half the width of its 95 % interval.

    The interval is Student's t; of one pair it is infinite.
    """
    by_pair = {(run["concept"], run["seed"]): run[key] for run in reference}
    pairs = [run[key] - by_pair[run["concept"], run["seed"]] for run in runs]
    if len(pairs) < 2:
        return pairs[0], math.inf
    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return statistics.fmean(pairs), half


if __name__ == "__main__":
    sys.exit(main())
