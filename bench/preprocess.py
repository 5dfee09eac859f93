"""How fast pictures become training pictures, against a bare loop over the same files: python -m bench.preprocess.

Both loops are measured in turns in one run, with the same number of processes; bench/results/preprocess.json gets
every single figure, docs/preprocess-speed.md the tables. `share` is our speed in parts of the bare loop's: 1 is as
fast.

    path    read, decode with all checks, choose the bucket, crop and resize to it; bare: open, convert, crop and resize
    ingest  all of that stage, with its cache: the decoded copy, hashes; bare: open, convert, save as PNG
    many    a whole preprocessing of tens of thousands, in a process of its own: its speed and memory, done again, and
            killed half way and done again
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps

from preprocess import Limits, buckets, ingest
from preprocess.picture import decode
from preprocess.types import Item

ROOT = Path(__file__).resolve().parent.parent
RESOLUTION, STEP = 512, 64
SHAPES = [(1024, 768), (768, 1024), (800, 800), (1200, 675)]
_ALLOWED = buckets.sizes(RESOLUTION, STEP)
_LIMITS = Limits()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.preprocess", description="Speed of preprocessing.")
    parser.add_argument("--photos", type=int, default=64, help="JPEGs of about a megapixel")
    parser.add_argument("--small", type=int, default=2000, help="PNGs of 64 x 64 pixels")
    parser.add_argument("--many", type=int, default=50_000, help="of such PNGs in a whole preprocessing; 0 leaves it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="the last also for --many")
    parser.add_argument("--scratch", type=Path, help="folder for the files, 2 GB for 50000 [default: the system's]")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/preprocess.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/preprocess-speed.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        sets = {
            "photos": photos(Path(folder, "photos"), args.photos),
            "small": small(Path(folder, "small"), args.small),
        }
        results: dict[str, Any] = {"machine": machine(), "rounds": args.rounds, "path": {}, "ingest": {}}
        for name, files in sets.items():
            for processes in args.processes:
                key = f"{name}, {processes} process{'es' * (processes > 1)}"
                results["path"][key] = compared(files, ours, bare, processes, args.rounds)
            results["ingest"][name] = ingested(files, Path(folder, "out"), args.rounds)
        if args.many:
            files = small(Path(folder, "many"), args.many)
            results["many"] = many(files, Path(folder), args.processes[-1])
    results["machine"]["load at the end"] = round(os.getloadavg()[0], 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    args.page.write_text(page(results), encoding="utf-8")
    print(page(results))
    return 0


def photos(folder: Path, count: int) -> list[Path]:
    """JPEGs with the detail of photographs: soft shapes and grain."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        width, height = SHAPES[index % len(SHAPES)]
        soft = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        grain = rng.normal(0, 6, (height, width, 1))
        grainy = np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(folder / f"{index:05}.jpg", quality=90)
    return sorted(folder.iterdir())


def small(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(1)
    for index in range(count):
        tiny = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        tiny.resize((64, 64)).save(folder / f"{index:05}.png")
    return sorted(folder.iterdir())


def ours(path: Path) -> int:
    picture = decode(path.read_bytes(), _LIMITS)
    item = Item(path.stem, path.name, "", picture.width, picture.height, path.name)
    item = buckets.bucketed(item, _ALLOWED)
    return ImageOps.fit(picture, item.bucket, Image.Resampling.LANCZOS, centering=item.centering).width


def bare(path: Path) -> int:
    with Image.open(path) as picture:
        rgb = picture.convert("RGB")
    shape = rgb.width / rgb.height
    bucket = min(_ALLOWED, key=lambda size: abs(math.log(size[0] / size[1] / shape)))
    return ImageOps.fit(rgb, bucket, Image.Resampling.LANCZOS).width


def compared(
    files: list[Path], one: Callable[[Path], int], other: Callable[[Path], int], processes: int, rounds: int
) -> dict[str, Any]:
    """Pictures a second of both in each round, and the median of their quotients."""
    speeds: dict[str, list[float]] = {"ours": [], "bare": []}
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for loop in (one, other):
            pool.map(loop, files[: 2 * processes])
        for round_ in range(rounds):
            turns = [("ours", one), ("bare", other)]
            for name, loop in turns if round_ % 2 else reversed(turns):
                began = time.perf_counter()
                pool.map(loop, files, chunksize=8)
                speeds[name].append(len(files) / (time.perf_counter() - began))
    return figures(speeds)


def ingested(files: list[Path], out: Path, rounds: int) -> dict[str, Any]:
    """The same for the whole first stage; `again` is a second pass, which finds all in its cache."""
    speeds: dict[str, list[float]] = {"ours": [], "again": [], "bare": []}
    for _ in range(rounds):
        for name in ("ours", "again", "bare"):
            began = time.perf_counter()
            if name == "bare":
                (out / "bare").mkdir()
                for path in files:
                    saved(path, out / "bare")
            else:
                ingest(str(files[0].parent), out)
            speeds[name].append(len(files) / (time.perf_counter() - began))
        shutil.rmtree(out)
    return figures(speeds)


_BUILD = """
import json, logging, re, sys, threading, time
from pathlib import Path
from preprocess import build
from trainer.args import DataArgs

class Stages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.speeds = {}
    def emit(self, record):
        stage, _, rest = record.getMessage().rpartition(" pictures/s")[0].partition("/")
        self.speeds[stage.rpartition(" ")[0]] = float(rest.split()[-1])

def peak_mib(pid):
    try:
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1024
    except (OSError, TypeError):  # it has ended
        return 0

def watch():  # a child's own ru_maxrss would count what its parent had when it was started
    global worker
    while True:
        for file in Path("/proc/self/task").glob("*/children"):
            try:
                worker = max([worker, *(peak_mib(pid) for pid in file.read_text().split())])
            except OSError:
                pass
        time.sleep(0.2)

worker = 0
threading.Thread(target=watch, daemon=True).start()
stages, log = Stages(), logging.getLogger("trainer.progress")
log.addHandler(stages)
log.setLevel(logging.INFO)
log.propagate = False
logging.getLogger("preprocess").setLevel(logging.ERROR)
options = {"source": "", "workers": int(sys.argv[3]), "limits": {"entries": 10**6}, "dedupe": sys.argv[4]}
began = time.monotonic()
report = build(sys.argv[1], Path(sys.argv[2]), DataArgs.model_validate(options), 64, 16)
seconds = time.monotonic() - began
print(json.dumps({"pictures": len(report.items), "seconds": round(seconds, 1), "per_second": stages.speeds,
                  "peak_mib": peak_mib("self"), "peak_mib_of_a_worker": worker}))
"""


def many(files: list[Path], folder: Path, processes: int) -> dict[str, Any]:
    """Whole preprocessings of the files, each in a process of its own with so many workers."""
    source, out = files[0].parent, folder / "many_out"
    began = time.perf_counter()
    (folder / "many_bare").mkdir()
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.map(functools.partial(saved, folder=folder / "many_bare"), files, chunksize=64)
    bare_s = time.perf_counter() - began
    shutil.rmtree(folder / "many_bare")
    results: dict[str, Any] = {"pictures": len(files), "workers": processes, "bare_s": round(bare_s, 1)}
    results["first"] = built(source, out, processes)
    results["again"] = built(source, out, processes)
    results["near copies too"] = built(source, out, processes, dedupe="near")
    shutil.rmtree(out)
    results["killed half way"] = killed(source, out, processes, len(files))
    shutil.rmtree(out)
    for how in ("zip", "tar"):
        packed = Path(shutil.make_archive(str(folder / "packed"), how, source))
        results[how] = built(packed, out, processes)
        packed.unlink()
        shutil.rmtree(out)
    return results


def saved(path: Path, folder: Path) -> None:
    with Image.open(path) as picture:
        picture.convert("RGB").save(folder / f"{path.stem}.png", compress_level=1)


def started(source: Path, out: Path, processes: int, dedupe: str) -> subprocess.Popen[bytes]:
    words = [str(source), str(out), str(processes), dedupe]
    return subprocess.Popen([sys.executable, "-c", _BUILD, *words], cwd=ROOT, stdout=subprocess.PIPE)


def built(source: Path, out: Path, processes: int, dedupe: str = "exact") -> dict[str, Any]:
    process = started(source, out, processes, dedupe)
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"preprocessing of {source} ended with exit status {process.returncode}")
    return json.loads(said)


def killed(source: Path, out: Path, processes: int, count: int) -> dict[str, Any]:
    """Kills it as soon as half of the pictures are there and does it again; which of them were decoded twice."""
    process = started(source, out, processes, "exact")
    pictures = out / "cache/pictures"
    while not pictures.is_dir() or len(os.listdir(pictures)) < count // 2:
        if process.poll() is not None:
            raise RuntimeError("preprocessing ended before it could be killed")
        time.sleep(0.1)
    process.kill()
    process.communicate()
    time.sleep(1.0)  # its workers end by themselves
    before = {path.name: path.stat().st_mtime_ns for path in pictures.glob("[!.]*.png")}
    after = built(source, out, processes)
    twice = sum((pictures / name).stat().st_mtime_ns != then for name, then in before.items())
    return {"there": len(before), "decoded_twice": twice, **after}


def figures(speeds: dict[str, list[float]]) -> dict[str, Any]:
    quotients = [a / b for a, b in zip(speeds["ours"], speeds["bare"], strict=True)]
    rounded = {f"{name}_per_second": [round(speed, 1) for speed in each] for name, each in speeds.items()}
    return {"share": round(statistics.median(quotients), 3), **rounded}


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
    }


def page(results: dict[str, Any]) -> str:
    """docs/preprocess-speed.md."""
    about = results["machine"]
    lines = [
        "# Speed of preprocessing",
        "",
        "Written by `python -m bench.preprocess` from `bench/results/preprocess.json`; its docstring says what is "
        "measured.",
        f"{about['cores']} cores ({about['processor']}), Python {about['python']}, Pillow {about['pillow']}; "
        f"load {about['load']} at the start and {about['load at the end']} at the end, so other work took part of the "
        "cores where that is above the number of processes."
        if about["load at the end"] > about["cores"]
        else f"{about['cores']} cores ({about['processor']}), Python {about['python']}, Pillow {about['pillow']}.",
        "",
        "| what | ours, pictures/s | bare loop, pictures/s | share |",
        "|---|---|---|---|",
    ]
    for part in ("path", "ingest"):
        for key, found in results[part].items():
            ours_, bare_ = (statistics.median(found[f"{name}_per_second"]) for name in ("ours", "bare"))
            lines.append(f"| {part}: {key} | {ours_:.0f} | {bare_:.0f} | {found['share']:.2f} |")
    if "many" in results:
        lines += ["", *_page_of_many(results["many"])]
    return "\n".join(lines) + "\n"


def _page_of_many(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['pictures']} PNGs of 64 x 64 pixels, {found['workers']} workers. The bare loop opens, converts and "
        f"saves them in {found['bare_s']} s; ours also checks, hashes, looks for copies, chooses buckets, draws the "
        "contact sheet and writes dataset.jsonl.",
        "",
        "| run | seconds | decoding, pictures/s | peak, MiB | peak of a worker, MiB |",
        "|---|---|---|---|---|",
    ]
    for run in ("first", "again", "near copies too", "killed half way", "zip", "tar"):
        one = found[run]
        speed = f"{one['per_second']['decoding']:.0f}" if "decoding" in one["per_second"] else ""
        lines.append(f"| {run} | {one['seconds']} | {speed} | {one['peak_mib']} | {one['peak_mib_of_a_worker']} |")
    half = found["killed half way"]
    lines += [
        "",
        f"Killed with {half['there']} pictures decoded, the next run decoded {half['decoded_twice']} of them "
        f"once more and the {found['pictures'] - half['there']} that were missing.",
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
