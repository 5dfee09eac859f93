"""The tables of speed in docs/benchmarks.md, from bench/results/speed.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.measuring import Figures, ratio, seconds

NOT_YET = "not yet run"
SHARE, LEAST_GB = 0.5, 8.0  # what is asked of a GPU


def targets(results: Figures) -> str:
    """What is aimed at, and what was measured."""
    rows: list[tuple[str, str, float, float]] = []
    if "full" in results:
        of = _case(results, "bf16")
        rows += [
            (
                "step / bare forward and backward, SD1.5, 256 px, bf16",
                "1.03",
                ratio(of["ways"], "trainer", "bare"),
                1.03,
            ),
            (
                "the same / plain script's forward and backward",
                "0.65",
                ratio(of["ways"], "trainer", "plain, bare"),
                0.65,
            ),
            ("the same / plain script, nothing cached", "0.45", ratio(of["ways"], "trainer", "plain"), 0.45),
        ]
    if "savings" in results:
        share = _over_needed(results["savings"]["bf16"])
        rows.append(("peak memory / weights + what a bare step holds, the same, not packed", "1.15", share, 1.15))
    if "jobs" in results:
        whole = {name: of["whole"] for name, of in results["jobs"].items() if name != "made"}
        rows += [
            ("100 steps on the tiny base, whole process / plain script, cached", "0.6",
             ratio(whole, "trainer", "plain, cached"), 0.6),
            ("start to the end of step 1, tiny base, CPU s", "3.5", results["jobs"]["trainer"]["first"]["cpu_s"], 3.5),
        ]  # fmt: skip
    texts = [[what, goal, f"{found:.3f}", "reached" if found <= most else "missed"] for what, goal, found, most in rows]
    return _table(["what", "target", "measured", ""], [*texts, *_gpu_targets(results.get("gpu"))])


def _gpu_targets(found: Figures | None) -> list[list[str]]:
    step = "GPU: SDXL, 1024 px, bf16, batch 4: share of the matmul peak"
    rows = [[step, ">= 50 %"], [f"{step}, compiled blocks", ">= 50 %"], ["GPU: SDXL, batch 1, least memory", "8 GB"]]
    if found is None:
        return [[*row, NOT_YET, ""] for row in rows]
    shares = [found[way]["bound_s"] / seconds(found[way]["ways"]["trainer"]) for way in ("plain", "compiled")]
    least = found["least"]["peak_mib"] * 2**20 / 1e9
    texts = [f"{share:.0%}" for share in shares] + [f"{least:.1f} GB"]
    good = [share >= SHARE for share in shares] + [least <= LEAST_GB]
    return [[*row, text, "reached" if fine else "missed"] for row, text, fine in zip(rows, texts, good, strict=True)]


def steps(results: Figures) -> str:
    """CPU seconds a step, each way."""
    rows: list[list[str]] = []
    for part in ("tiny", "full"):
        for case in results.get(part, {}).get("cases", ()):
            name = f"{case['family']} {case['size']}, {case['resolution']} px, batch {case['batch']}, {case['dtype']}"
            name += ", packed" if case.get("packed") else ""
            for way, figures in case["ways"].items():
                low, high = figures["quartiles"]
                limit = f"{figures['cpu_s'] / case['bound_s']:.1f}"
                rate = f"{case['images_per_s'][way]:.3g}"
                rows.append([name, way, f"{figures['cpu_s']:.3g}", f"{low:.3g}..{high:.3g}", rate, limit])
                name = ""
    return _table(["", "way", "CPU s a step", "quartiles", "pictures/s", "x the FLOP bound"], rows)


def savings(results: Figures) -> str:
    """What training holds, by option."""
    return _held("sd15 full, 256 px, batch 1", results.get("savings", {}))


def large(results: Figures) -> str:
    """The same of a larger base."""
    return _held("sdxl full, 1024 px, batch 1", results.get("large", {}))


def _held(what: str, ways: Figures) -> str:
    rows = [
        [
            name,
            str(sum(case["weights_mib"].values())),
            str(case["activations_mib"]),
            str(case["prepared_mib"]),
            str(case["peak_mib"]),
            f"{_over_needed(case):.2f}",
            f"{case['ways']['trainer']['cpu_s']:.3g}",
        ]
        for name, case in ways.items()
        if name != "made"
    ]
    heads = [what, "weights", "a bare step", "peak until the first step", "peak"]
    return _table([*heads, "peak / (weights + step)", "CPU s a step"], rows)


def _over_needed(case: Figures) -> float:
    return round(case["peak_mib"] / (sum(case["weights_mib"].values()) + case["activations_mib"]), 3)


def exact(results: Figures) -> str:
    """How far gradients are from those in double precision."""
    rows = [
        [
            f"{case['family']} {case['size']}, {case['resolution']} px, {case['dtype']}, {case['tensors']} tensors",
            *(
                f"{case[way][which]:.1e}"
                for way in ("plain", "packed", "packed to plain")
                for which in ("median", "worst")
            ),
        ]
        for case in results.get("exact", {}).get("cases", ())
    ]
    heads = ["relative error of a tensor's gradient", "plain: median", "worst", "packed: median", "worst"]
    return _table([*heads, "packed to plain: median", "worst"], rows)


def jobs(results: Figures) -> str:
    """Whole processes."""
    rows = [
        [name, *(_with_quartiles(of[key]) for key in ("first", "whole"))]
        for name, of in results.get("jobs", {}).items()
        if name != "made"
    ]
    return _table(["100 steps on the tiny base", "CPU s to the first step's end", "CPU s in all"], rows)


def _with_quartiles(figures: Figures) -> str:
    low, high = figures["quartiles"]
    return f"{figures['cpu_s']:.1f} ({low:.1f}..{high:.1f})"


def growth(results: Figures) -> str:
    """What a step costs as one thing grows."""
    rows: list[list[str]] = []
    for axis, cases in results.get("growth", {}).items():
        if axis == "made":
            continue
        for case in cases:
            ways = case["ways"]
            if axis == "steps":
                first, last = (f"{1000 * ways[which]['cpu_s']:.1f}" for which in ("first", "last"))
                before, after = case["mib"]
                rows.append(
                    [f"{case['rounds']} steps", f"{first} first, {last} last", "", f"{before} first, {after} last"]
                )
            else:
                step = f"{1000 * ways['trainer']['cpu_s']:.1f}"
                prepared = f"{case['prepared_cpu_s']:.1f}" if axis == "pictures" else ""
                rows.append([f"{axis} {case[axis]}", step, prepared, str(case["peak_mib"])])
    return _table(["tiny base, fp32", "CPU ms a step", "CPU s to prepare", "MiB"], rows)


def parts(results: Figures) -> str:
    """What a run does beside its steps."""
    rows: list[list[str]] = []
    for case in results.get("parts", {}).get("cases", ()):
        ways = case["ways"]
        rows += [
            ["batches, without the denoiser", f"{case['data_pictures_per_s']} pictures/s"],
            [
                f"sampling, {case['sampling_steps']} steps with guidance",
                f"{case['sampling_pictures_per_s']:.2f} pictures/s",
            ],
            ["a checkpoint", f"{1000 * ways['checkpoint']['cpu_s']:.0f} ms"],
            ["an export", f"{1000 * ways['export']['cpu_s']:.0f} ms"],
        ]
    return _table(["tiny base, 64 px, CPU", ""], rows)


TABLES: dict[str, Callable[[Figures], str]] = {
    "targets": targets,
    "steps": steps,
    "exact": exact,
    "savings": savings,
    "large": large,
    "jobs": jobs,
    "parts": parts,
    "growth": growth,
}


def _case(results: Figures, dtype: str) -> Figures:
    return next(case for case in results["full"]["cases"] if case["dtype"] == dtype)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))
