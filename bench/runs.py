"""Runs of a bench: trained and scored several at a time, and kept, so that a bench that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from testbed.concepts import CONCEPTS, training_scenes, unseen_scenes
from trainer import cli, console
from trainer.rundir import atomic_write

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results"
WORK = ROOT / "bench" / "work"
PICTURES = "--pictures"  # among a method's options: how many pictures teach, which is the bench's and not train.py's
CLASS = "{class}"  # in an option: a word for the concept's class, which the base knows
WORDS = {"shape": "star", "fill": "striped", "style": "drawing"}  # by a concept's kind


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
    def pictures(self) -> int:
        given = dict(zip(self.options, self.options[1:], strict=False))
        return int(given.get(PICTURES, 10))

    @property
    def scores(self) -> Path:
        return self.work / f"{self.name}.json"


def work(jobs: Sequence[Job], at_once: int) -> dict[Job, dict[str, Any]]:
    """What each run scored; runs whose scores are in the work folder are not made."""
    done = {job: json.loads(job.scores.read_text(encoding="utf-8")) for job in jobs if job.scores.exists()}
    todo = [job for job in jobs if job not in done]
    check(todo)  # a method that is spelled wrong is known now and not in an hour
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


def adopt(results: Path, folder: Path) -> None:
    """Puts the runs of an earlier bench into the work folder, as if they had been made there.

    Which run it was, its concept, preset, options and seed say; not the code, nor what stands in the preset.
    """
    told = json.loads(results.read_text(encoding="utf-8"))
    for method in (method for table in told["tables"].values() for method in table.values()):
        for run in method["runs"]:
            job = Job(run["concept"], told["preset"], tuple(method["options"]), run["seed"], folder, None)
            if not job.scores.exists():
                atomic_write(job.scores, json.dumps({key: value for key, value in run.items() if key != "overall"}))


def check(jobs: Sequence[Job]) -> None:
    """CommandError for options that train.py does not know."""
    for job in jobs:
        cli.parse(_command(job, job.work)[1:])


def scored(job: Job, runner: Callable[[Job], Mapping[str, Any]] | None = None) -> Mapping[str, Any]:
    """What a run scored, made only if nobody has made it yet."""
    if job.scores.exists():
        return json.loads(job.scores.read_text(encoding="utf-8"))
    return (runner or one)(job)


def one(job: Job) -> dict[str, Any]:
    """Trains and scores one run in the way a person does."""
    import torch

    from testbed.concepts import write_zip
    from testbed.runs import score_run

    torch.set_num_threads(1)
    console.hush_libraries()
    (job.work / "runs").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{job.name}-", dir=job.work / "runs") as own:  # two may make the same run
        run, pictures = Path(own) / job.name, Path(own) / f"{job.name}.zip"
        write_zip(pictures, job.concept, job.pictures)
        began = time.monotonic()
        _python(*_command(job, Path(own)))
        seconds = time.monotonic() - began
        scores = score_run(run, job.concept).rows()
        result = {
            "concept": job.concept,
            "seed": job.seed,
            "train_process_s": round(seconds, 1),
            **{k: round(v, 4) for k, v in scores.items()},
        }
        if job.file:
            result["kept"] = json.loads((run / job.file).read_text(encoding="utf-8"))
        atomic_write(job.scores, json.dumps(result))
        if job.keep:
            shutil.copytree(run, job.keep / job.name)
    return result


def _command(job: Job, folder: Path) -> list[str]:
    word = WORDS[CONCEPTS[job.concept].kind]
    options = [option.replace(CLASS, word) for option in job.options]
    if PICTURES in options:
        at = options.index(PICTURES)
        del options[at : at + 2]
    return [
        *("train.py", job.preset, str(folder / f"{job.name}.zip"), "--runtime.out", str(folder)),
        *("--runtime.name", job.name, "--runtime.seed", str(job.seed), *_prompts(job.concept), *options),
    ]


def _prompts(name: str) -> list[str]:
    """What is drawn on the way: in the preset's prompts the trigger names a thing, which fills and styles are not."""
    concept = CONCEPTS[name]
    if concept.kind == "shape":
        return []
    scenes = unseen_scenes(concept, 4, 5, training_scenes(concept, 10, 5))
    drawn = [concept.prompt(scene) for scene in scenes] + ["a green star on a yellow background"]
    return ["--sample.prompts", json.dumps(drawn)]


def _python(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")


def before(concept: str, preset: str, folder: Path) -> dict[str, float]:
    """What the untrained base scores on the same prompts: the trigger is a word that it does not know."""
    import io
    import zipfile

    import torch
    from PIL import Image

    from testbed.concepts import write_zip
    from testbed.runs import score_base
    from trainer.args import ModelArgs

    torch.set_num_threads(1)
    base = json.loads((ROOT / preset).read_text(encoding="utf-8"))["model"]
    kept = folder / f"{concept}-{hashlib.sha256(json.dumps(base).encode()).hexdigest()[:10]}-before.json"
    if not kept.exists():
        pictures = folder / f"{concept}.zip"
        write_zip(pictures, concept)
        with zipfile.ZipFile(pictures) as archive:
            names = sorted(n for n in archive.namelist() if n.endswith(".png"))
            references = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
        scores = score_base(ModelArgs.model_validate(base), concept, references)
        atomic_write(kept, json.dumps({k: round(v, 4) for k, v in scores.rows().items()}))
    return json.loads(kept.read_text(encoding="utf-8"))


def machine(jobs: int) -> dict[str, Any]:
    import torch

    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "runs_at_a_time": jobs,
    }
