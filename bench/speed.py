"""How fast training is, against a plain script and against the machine's limit: python -m bench.speed [--quick].

Every figure is CPU time of one thread, or a GPU's until it is done, with ways that are compared taking turns in one
process. The part gpu is left out where there is none, large where it is not named, and growth from --quick. Writes
bench/results/speed.json; `python -m bench.tables` makes the tables of docs/benchmarks.md from it.
A single case: python -m bench.speed --size full --resolution 256 --batch 1 --dtype bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.measuring import Figures, spread
from trainer.rundir import atomic_write

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / "speed.json"
ALONE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow")
FULL = {"size": "full", "resolution": 256, "batch": 1, "pictures": 2}

PLAIN = {"packed": "off"}
SAVINGS: dict[str, tuple[str, dict[str, object]]] = {  # what is shown -> model.dtype, and the rest of the section
    "fp32": ("fp32", PLAIN),
    "bf16": ("bf16", PLAIN),
    "bf16, packed": ("bf16", {"packed": "on"}),
    "bf16, packed, attention sdpa": ("bf16", {"packed": "on", "attention": "sdpa"}),
    "bf16, gradient checkpointing": ("bf16", {**PLAIN, "gradient_checkpointing": True}),
    "bf16, int8": ("bf16", {"quantise": "int8"}),
    "bf16, int8, gradient checkpointing": ("bf16", {"quantise": "int8", "gradient_checkpointing": True}),
}
THRIFTY = ("bf16, gradient checkpointing", "bf16, int8, gradient checkpointing")  # those that are for large bases
COMPARED = 2  # whole jobs that a target is about
LARGE = {"family": "sdxl", "size": "full", "resolution": 1024, "dtype": "bf16", "device": "cuda", "pictures": 4}
LEAST = SAVINGS[THRIFTY[1]][1]  # of memory


class MeasureError(RuntimeError):
    """A measured process ended badly."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds and small sizes: under 3 minutes")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="only these parts; the others' figures are kept")
    parser.add_argument("--pictures", type=int, default=10000, help="largest dataset of the part growth")
    parser.add_argument("--out", type=Path, help="[default: bench/results/speed.json; --quick and single cases: none]")
    case = parser.add_argument_group("a single case, shown and not written")
    for name in ("family", "size", "dtype", "what", "model", "device"):
        case.add_argument(f"--{name}")
    for name in ("resolution", "batch", "rank", "rounds"):
        case.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    single = {name: value for name in CASE if (value := getattr(args, name)) is not None}
    if single:
        print(json.dumps(stepped(**single), indent=2))
        return 0
    out: Path | None = args.out or (None if args.quick else OUT)
    results: Figures = json.loads(out.read_text(encoding="utf-8")) if args.only and out and out.exists() else {}
    for name in tqdm(args.only or _usual(quick=args.quick), unit="part"):
        results[name] = PARTS[name](args) | {"made": machine()}
        if out:
            atomic_write(out, json.dumps(results, indent=1) + "\n")
    from bench import speed_tables  # the parts alone need none

    print("\n\n".join(table(results) for table in speed_tables.TABLES.values()))
    return 0


# As a run's own process, which puts imports off: memory is compared, too.
STEPPING = "from trainer import lean; lean.start(); from bench import stepping; stepping.main()"
CASE = ("family", "size", "dtype", "what", "model", "device", "resolution", "batch", "rank", "rounds")


def stepped(**case: Any) -> Figures:
    """Figures of one case, measured in a process of its own."""
    return json.loads(_run([sys.executable, "-c", STEPPING, json.dumps(case)])[0].splitlines()[-1])


def _run(command: Sequence[str]) -> tuple[str, float, float, int]:
    """What a process prints, its CPU and wall seconds, and its peak in MiB (the largest so far)."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ALONE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MeasureError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, cpu, time.perf_counter() - began, after.ru_maxrss // 1024


# --- parts


def tiny(args: argparse.Namespace) -> Figures:
    """A step on the shipped base."""
    return {"cases": [stepped(rounds=8 if args.quick else 60, pictures=8)]}


def full(args: argparse.Namespace) -> Figures:
    """A step of Stable Diffusion 1.5's full size."""
    rounds = {"bf16": 1} if args.quick else {"bf16": 9, "fp32": 3}
    return {"cases": [stepped(**FULL, dtype=dtype, rounds=count) for dtype, count in rounds.items()]}


def savings(args: argparse.Namespace) -> Figures:
    """What training at that size holds in memory, and a step's time, with each option that saves some."""
    return _held(["bf16"] if args.quick else SAVINGS, {**FULL, "family": "sd15", "rounds": 1 if args.quick else 3})


def large(args: argparse.Namespace) -> Figures:
    """The same of Stable Diffusion XL's full size at 1024 px, which takes 10 GB of memory and ten minutes."""
    return _held(THRIFTY, {**LARGE, "device": "cpu", "batch": 1, "pictures": 2, "rounds": 1})


def _held(names: Iterable[str], case: Figures) -> Figures:
    """Memory and time by option of SAVINGS. The base is read from a folder, as people's are."""
    ways = {name: SAVINGS[name] for name in names}
    found: Figures = {}
    for dtype in dict.fromkeys(dtype for dtype, _ in ways.values()):
        with tempfile.TemporaryDirectory() as scratch:
            base = f"{scratch}/base"
            write = "from pathlib import Path; from bench import fullsize as f; "
            _run([sys.executable, "-c", f"{write}f.written(f.{case['family'].upper()}, {dtype!r}, Path({base!r}))"])
            for name, (own, model) in ways.items():
                if own == dtype:
                    full = {**case, "what": "memory", "dtype": dtype, "model": json.dumps({**model, "base": base})}
                    found[name] = stepped(**full)
                    del found[name]["model"]  # which names a folder that is gone
    return found


def exact(args: argparse.Namespace) -> Figures:
    """How far gradients are from those in double precision, with plain and with packed weights."""
    case = {"what": "gradients", "batch": 1, **({} if args.quick else FULL)}
    return {"cases": [stepped(**case, dtype=dtype) for dtype in (["fp32"] if args.quick else ["fp32", "bf16"])]}


def jobs(args: argparse.Namespace) -> Figures:
    """Whole processes of 100 steps on the shipped base, and the CPU time at which their first step ends."""
    rounds = 1 if args.quick else 5
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with zipfile.ZipFile(ROOT / "testbed/quickstart/mushroom.zip") as archive:
            archive.extractall(folder / "pictures")
        for turn in range(rounds):
            commands = _commands(folder, turn)
            for name, command in list(commands.items())[: COMPARED if args.quick else None]:
                said, cpu, wall, _ = _run(command)
                clock = folder / f"first_{name}_{turn}"
                first = (
                    float(clock.read_text()) if clock.exists() else json.loads(said.splitlines()[-1])["first_step_s"]
                )
                of = found.setdefault(name, {"whole": [], "first": [], "wall": []})
                for key, value in (("whole", cpu), ("first", first), ("wall", wall)):
                    of[key].append(value)
    return {name: {key: spread(values) for key, values in of.items()} for name, of in found.items()}


def _commands(folder: Path, turn: int) -> dict[str, list[str]]:
    """The same 100 steps of LoRA on attention, first of those that are COMPARED.

    train.py also draws a picture before and three after, and reports.
    """
    pictures = str(folder / "pictures")
    script = [sys.executable, "-m", "bench.plain", str(ROOT / "testbed/base"), pictures]

    def trained(name: str, *more: str) -> list[str]:
        clock = {"use": "bench.clock:FirstStep", "options": {"file": str(folder / f"first_{name}_{turn}")}}
        own = ["--runtime.out", str(folder / f"{name}_{turn}"), "--runtime.steps", "100", "--runtime.device", "cpu"]
        return [sys.executable, "train.py", *more, *own, "--hooks.extra", json.dumps([clock])]

    few = ["--data.source", pictures, "--sample.steps", "1", "--sample.prompts", "a TOK", "--runtime.threads", "1"]
    few += ["--adapter.targets", "attention"]
    return {
        "trainer": trained("trainer", *few),
        "plain, cached": [*script, str(folder / f"c{turn}"), "--cached"],
        "plain": [*script, str(folder / f"u{turn}")],
        "quickstart": trained("quickstart", "presets/quickstart.json", pictures),
    }


def parts(args: argparse.Namespace) -> Figures:
    """The data path alone, sampling, checkpoint and export."""
    return {"cases": [stepped(what="work", rounds=2 if args.quick else 10)]}


def growth(args: argparse.Namespace) -> Figures:
    """How cost grows with one thing at a time, on the shipped base."""
    axes = {
        "batch": [1, 2, 4, 8],
        "resolution": [32, 64, 128],
        "rank": [1, 8, 64],
        "pictures": [n for n in (10, 100, 1000, 10000, 50000) if n <= args.pictures],
    }
    grown = {axis: [stepped(what="pictures", rounds=20, **{axis: n}) for n in some] for axis, some in axes.items()}
    return grown | {"steps": [stepped(what="length", rounds=1000)]}


def gpu(args: argparse.Namespace) -> Figures:
    """Stable Diffusion XL's full size on a GPU: a step against what the GPU can do, and the least memory of a step."""
    rounds = 3 if args.quick else 10
    step = {**LARGE, "batch": 4, "rounds": rounds}
    return {
        "name": _run([sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"])[0].strip(),
        "plain": stepped(**step),
        "compiled": stepped(**step, model=json.dumps({"compile": "blocks"})),
        "least": stepped(**LARGE, batch=1, rounds=rounds, what="memory", model=json.dumps(LEAST)),
    }


def _usual(*, quick: bool) -> list[str]:
    """The parts that are measured where none is named."""
    left_out = {"large", "growth"} if quick else {"large"}
    has_gpu = _run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"])[0].strip() == "True"
    return [part for part in PARTS if part not in left_out and (part != "gpu" or has_gpu)]


PARTS = {
    "tiny": tiny,
    "full": full,
    "exact": exact,
    "savings": savings,
    "large": large,
    "jobs": jobs,
    "parts": parts,
    "growth": growth,
    "gpu": gpu,
}


def machine() -> Figures:
    """Where and with what a part was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    return {
        "at": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": facts.get("model name", platform.machine()),
        "has": wide,
        "cores": os.cpu_count(),
        "threads": 1,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "seed": 0,
    }


if __name__ == "__main__":
    sys.exit(main())
