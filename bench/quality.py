"""How well held-out concepts are learned on the shipped base: python -m bench.quality.

Trains every method with every seed, scores each run from its exported files, and writes
bench/results/quality.json with every single figure, the means and the spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer import console

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results"
METHODS: dict[str, list[str]] = {
    "LoRA alone": ["--text.tokens", "0", "--optim.adapter.curve", "cosine"],
    "textual inversion alone": ["--adapter.kind", "none", "--optim.rows.curve", "cosine"],
    "pivotal": [],
    "pivotal, captions by clip": [
        *("--data.recaption", "--data.captioner", "clip", "--data.caption_model.base", "testbed/base/clip"),
        *("--data.mode", "object", "--data.class_words", "shape"),
    ],
    "pivotal, prior kept": ["--data.class_words", "star,heart,circle,square", "--objective.prior_weight", "1"],
}
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
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="Quality of the quickstart's methods.")
    parser.add_argument("--concept", default="mushroom")
    parser.add_argument("--preset", default="presets/quickstart.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, a thread each")
    parser.add_argument("--keep", type=Path, help="folder that gets a copy of every run")
    parser.add_argument("--out", type=Path, default=OUT / "quality.json")
    args = parser.parse_args()
    console.hush_libraries()
    results: dict[str, Any] = {
        "concept": args.concept,
        "preset": args.preset,
        "machine": machine(args.jobs),
        "methods": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / f"{args.concept}.zip"
        _zip(args.concept, pictures)
        results["before"] = before(args.concept, pictures, Path(folder))
        todo = [(method, seed) for method in args.methods for seed in range(args.seeds)]
        with ThreadPoolExecutor(args.jobs) as pool:
            done = list(pool.map(lambda job: one(*job, args, pictures, Path(folder)), todo))
        for method in args.methods:
            results["methods"][method] = summary([d for d, (m, _) in zip(done, todo, strict=True) if m == method])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    return 0


def _zip(concept: str, path: Path) -> None:
    from testbed.concepts import write_zip

    write_zip(path, concept)


def one(method: str, seed: int, args: argparse.Namespace, pictures: Path, folder: Path) -> dict[str, Any]:
    """Trains and scores one run in the way a person does."""
    run = folder / f"{method.lower().replace(', ', '-').replace(' ', '-')}-{args.concept}-{seed}"
    train = ["train.py", args.preset, str(pictures), "--runtime.out", str(folder), "--runtime.name", run.name]
    began = time.monotonic()
    _python(*train, "--runtime.seed", str(seed), *METHODS[method])
    seconds = time.monotonic() - began
    _python("-m", "testbed", "score", str(run), "--concept", args.concept)
    scores: dict[str, float] = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    print(f"{method} seed {seed}: {seconds:.0f} s, " + ", ".join(f"{k} {scores[k]:.2f}" for k in SHOWN), flush=True)
    if args.keep:
        shutil.copytree(run, args.keep / run.name)
    return {"seed": seed, "train_process_s": round(seconds, 1), **{k: round(v, 4) for k, v in scores.items()}}


def _python(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")


def before(concept: str, pictures: Path, folder: Path) -> dict[str, float]:
    """What the untrained base scores on the same prompts: the trigger is a word that it does not know."""
    import io
    import zipfile

    from PIL import Image

    from testbed.runs import GUIDANCE, STEPS
    from testbed.score import Scorer
    from trainer import sampler
    from trainer.args import ModelArgs
    from trainer.generate import device
    from trainer.models.sd15 import SD15

    with zipfile.ZipFile(pictures) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".png"))
        references = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    family = SD15.load(ModelArgs.model_validate({"base": str(ROOT / "testbed" / "base")}), device("cpu"))
    scores = Scorer(concept, references).score(
        lambda prompts, seeds, _: sampler.generate(
            family, list(prompts), seeds=list(seeds), steps=STEPS, guidance=GUIDANCE
        )
    )
    return {k: round(v, 4) for k, v in scores.rows().items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    figures = [k for k in runs[0] if k not in ("seed", "n")]
    return {
        "mean": {k: round(statistics.fmean(r[k] for r in runs), 4) for k in figures},
        "spread": {k: round(max(r[k] for r in runs) - min(r[k] for r in runs), 4) for k in figures},
        "runs": runs,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: mean and, in brackets, lowest..highest over the seeds."""
    heads = ["", *[name.replace("_", " ") for name in SHOWN], "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines.append("| before training | " + " | ".join(f"{results['before'][k]:.2f}" for k in SHOWN) + " | |")
    for method, result in results["methods"].items():
        cells = []
        for key in SHOWN:
            values = [r[key] for r in result["runs"]]
            cells.append(f"{result['mean'][key]:.2f} ({min(values):.2f}..{max(values):.2f})")
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {result['mean']['train_process_s'] / 60:.1f} |")
    return "\n".join(lines)


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
