"""How well held-out concepts are learned on the shipped base: python -m bench.quality.

Trains every method of the chosen tables (bench/methods.py) with every seed, scores each run from its exported files,
and writes one JSON with every single figure, the means and the spread. A run whose scores are in the work folder is
not made again, so that a bench that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.methods import TABLES
from trainer import cli, console
from trainer.rundir import atomic_write

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results"
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="Quality of methods, in tables.")
    parser.add_argument("--concept", default="mushroom")
    parser.add_argument("--preset", default="presets/quickstart.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", nargs="*", choices=list(TABLES), default=["quickstart"])
    parser.add_argument("--methods", nargs="*", help="only these of the tables")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, a thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "bench" / "work", help="what finished runs scored")
    parser.add_argument("--keep", type=Path, help="folder that gets a copy of every run")
    parser.add_argument("--out", type=Path, default=OUT / "quality.json")
    args = parser.parse_args()
    console.hush_libraries()
    known = {method for table in args.tables for method in TABLES[table]}
    if unknown := sorted(set(args.methods or ()) - known):
        parser.error(f"no table of {', '.join(args.tables)} has {', '.join(unknown)}; they have {', '.join(known)}")
    args.work.mkdir(parents=True, exist_ok=True)
    chosen = {
        table: {name: options for name, options in TABLES[table].items() if not args.methods or name in args.methods}
        for table in args.tables
    }
    jobs = {
        _job(args, options, seed)
        for methods in chosen.values()
        for options in methods.values()
        for seed in range(args.seeds)
    }
    done = work(sorted(jobs, key=lambda job: job.seed), args.jobs)
    results: dict[str, Any] = {
        "concept": args.concept,
        "preset": args.preset,
        "machine": machine(args.jobs),
        "before": before(_job(args, [], 0)),
        "tables": {
            table: {
                name: summary(options, [done[_job(args, options, seed)] for seed in range(args.seeds)])
                for name, options in methods.items()
            }
            for table, methods in chosen.items()
        },
    }
    atomic_write(args.out, json.dumps(results, indent=2) + "\n")
    for name in chosen:
        print(f"\n{name}\n\n{table(results, name)}")
    return 0


@dataclass(frozen=True)
class Job:
    """One run, which several tables may show."""

    concept: str
    preset: str
    options: tuple[str, ...]
    seed: int
    work: Path
    keep: Path | None
    file: str | None = None  # a JSON file of the run directory that is kept beside the scores

    @property
    def name(self) -> str:
        options = hashlib.sha256(json.dumps([self.preset, self.options]).encode()).hexdigest()[:10]
        return f"{self.concept}-{options}-{self.seed}"

    @property
    def scores(self) -> Path:
        return self.work / f"{self.name}.json"


def _job(args: argparse.Namespace, options: Sequence[str], seed: int) -> Job:
    return Job(args.concept, args.preset, tuple(options), seed, args.work.resolve(), args.keep)


def work(jobs: Sequence[Job], at_once: int) -> dict[Job, dict[str, Any]]:
    """What each run scored; runs whose scores are in the work folder are not made."""
    done = {job: json.loads(job.scores.read_text(encoding="utf-8")) for job in jobs if job.scores.exists()}
    todo = [job for job in jobs if job not in done]
    for job in todo:  # a method that is spelled wrong is known now and not in an hour
        cli.parse(_command(job)[1:])
    failed: list[str] = []
    pool = ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn"))
    with pool, tqdm(total=len(jobs), initial=len(done), desc="runs", unit="run") as bar:
        running = {pool.submit(one, job): job for job in todo}
        try:
            for future in as_completed(running):
                bar.update()
                try:
                    done[running[future]] = future.result()
                except RuntimeError as error:
                    failed.append(str(error))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:  # the others are in the work folder
        raise SystemExit("\n".join(failed))
    return done


def one(job: Job) -> dict[str, Any]:
    """Trains and scores one run in the way a person does."""
    import torch

    from testbed.concepts import write_zip
    from testbed.runs import score_run

    torch.set_num_threads(1)
    console.hush_libraries()
    folder = job.work / "runs"
    run, pictures = folder / job.name, folder / f"{job.name}.zip"
    shutil.rmtree(run, ignore_errors=True)  # of a bench that was stopped
    folder.mkdir(parents=True, exist_ok=True)
    write_zip(pictures, job.concept)
    began = time.monotonic()
    _python(*_command(job))
    seconds = time.monotonic() - began
    scores = score_run(run, job.concept).rows()
    result = {"seed": job.seed, "train_process_s": round(seconds, 1), **{k: round(v, 4) for k, v in scores.items()}}
    if job.file:
        result["kept"] = json.loads((run / job.file).read_text(encoding="utf-8"))
    atomic_write(job.scores, json.dumps(result))
    if job.keep:
        shutil.copytree(run, job.keep / job.name)
    shutil.rmtree(run)
    pictures.unlink()
    return result


def _command(job: Job) -> list[str]:
    folder = job.work / "runs"
    return [
        *("train.py", job.preset, str(folder / f"{job.name}.zip"), "--runtime.out", str(folder)),
        *("--runtime.name", job.name, "--runtime.seed", str(job.seed), *job.options),
    ]


def _python(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")


def before(job: Job) -> dict[str, float]:
    """What the untrained base scores on the same prompts: the trigger is a word that it does not know."""
    import io
    import zipfile

    import torch
    from PIL import Image

    from testbed.concepts import write_zip
    from testbed.runs import score_base
    from trainer.args import ModelArgs

    torch.set_num_threads(1)
    base = json.loads((ROOT / job.preset).read_text(encoding="utf-8"))["model"]
    kept = job.work / f"{job.concept}-{hashlib.sha256(json.dumps(base).encode()).hexdigest()[:10]}-before.json"
    if not kept.exists():
        pictures = job.work / f"{job.concept}.zip"
        write_zip(pictures, job.concept)
        with zipfile.ZipFile(pictures) as archive:
            names = sorted(n for n in archive.namelist() if n.endswith(".png"))
            references = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
        scores = score_base(ModelArgs.model_validate(base), job.concept, references)
        atomic_write(kept, json.dumps({k: round(v, 4) for k, v in scores.rows().items()}))
    return json.loads(kept.read_text(encoding="utf-8"))


def summary(options: Sequence[str], runs: list[dict[str, Any]]) -> dict[str, Any]:
    figures = [k for k in runs[0] if k not in ("seed", "n")]
    return {
        "options": list(options),
        "mean": {k: round(statistics.fmean(r[k] for r in runs), 4) for k in figures},
        "spread": {k: round(max(r[k] for r in runs) - min(r[k] for r in runs), 4) for k in figures},
        "runs": runs,
    }


def table(results: dict[str, Any], name: str) -> str:
    """Markdown: mean and, in brackets, lowest..highest over the seeds."""
    heads = ["", *[key.replace("_", " ") for key in SHOWN], "train.py, s"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines.append("| before training | " + " | ".join(f"{results['before'][k]:.2f}" for k in SHOWN) + " | |")
    for method, result in results["tables"][name].items():
        cells = [_cell([run[key] for run in result["runs"]]) for key in SHOWN]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {result['mean']['train_process_s']:.0f} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    mean, lowest, highest = (f"{v:.2f}" for v in (statistics.fmean(values), min(values), max(values)))
    return mean if lowest == highest else f"{mean} ({lowest}..{highest})"


def machine(jobs: int) -> dict[str, Any]:
    import torch

    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "runs_at_a_time": jobs,
    }


if __name__ == "__main__":
    sys.exit(main())
