"""How fast pictures become training pictures, against a bare loop over the same files: python -m bench.preprocess.

Both loops are measured in turns in one run, with the same number of processes; bench/results/preprocess.json gets
every single figure. `share` is our speed in parts of the bare loop's: 1 is as fast.

    path    read, decode with all checks, choose the bucket, crop and resize to it; bare: open, convert, crop and resize
    ingest  all of that stage, with its cache: the decoded copy, hashes; bare: open, convert, save as PNG
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/preprocess.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
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
    results["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
        2**20 if sys.platform == "darwin" else 2**10
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
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
                    with Image.open(path) as picture:
                        picture.convert("RGB").save(out / "bare" / f"{path.stem}.png", compress_level=1)
            else:
                ingest(str(files[0].parent), out)
            speeds[name].append(len(files) / (time.perf_counter() - began))
        shutil.rmtree(out)
    return figures(speeds)


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


def table(results: dict[str, Any]) -> str:
    lines = ["| what | ours, pictures/s | bare loop, pictures/s | share |", "|---|---|---|---|"]
    for part in ("path", "ingest"):
        for key, found in results[part].items():
            ours_, bare_ = (statistics.median(found[f"{name}_per_second"]) for name in ("ours", "bare"))
            lines.append(f"| {part}: {key} | {ours_:.0f} | {bare_:.0f} | {found['share']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
