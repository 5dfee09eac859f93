"""A run directory -> report.html: one self-contained page with the pictures, the loss, the files and the args.

It reads the run directory and nothing else, so it can be made again at any time.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.rundir import RunDir, atomic_write, read_jsonl

WIDTH, HEIGHT, MARGIN = 720, 240, 44  # of the loss curve, in SVG units

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
img { max-width: 100%; image-rendering: auto; border: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; } code { background: #f6f6f6; }
svg text { font: 11px system-ui, sans-serif; fill: #555; }
"""


def write(run: RunDir) -> Path:
    """Writes RUN/report.html and gives its path."""
    atomic_write(run.report, page(run))
    return run.report


def page(run: RunDir) -> str:
    """The page as HTML."""
    args: dict[str, Any] = json.loads(run.args.read_text(encoding="utf-8"))
    name = html.escape(str(args["runtime"]["name"]))
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{name}</title><style>{_STYLE}</style>",
        f"<h1>{name}</h1>",
        _summary(run, args),
        _pictures(run),
        _loss(run),
        _exports(run),
        _skipped(run),
        _details("Args", json.dumps(args, indent=2)),
        _details("Environment", run.env.read_text(encoding="utf-8")) if run.env.is_file() else "",
    ]
    return "\n".join(part for part in parts if part) + "\n</html>\n"


def _summary(run: RunDir, args: dict[str, Any]) -> str:
    steps = list(read_jsonl(run.metrics)) if run.metrics.is_file() else []
    rows = {
        "Trigger": _triggers(args["data"]),
        "Base": args["model"]["base"],
        "Steps": f"{steps[-1]['step'] if steps else 0} of {args['runtime']['steps']}",
        **_choice(run),
        "Pictures": len(list(read_jsonl(run.dataset))) if run.dataset.is_file() else "unknown",
        "Time in updates": f"{sum(step['seconds'] for step in steps):.0f} s",
    }
    if run.stopped.is_file():
        found: dict[str, Any] = json.loads(run.stopped.read_text(encoding="utf-8"))
        rows["Stopped"] = f"after step {found['step']} by {found['by']}: {found['reason']}"
    body = "".join(f"<tr><th>{key}</th><td>{html.escape(str(value))}</td></tr>" for key, value in rows.items())
    return f"<table>{body}</table>"


def _choice(run: RunDir) -> dict[str, str]:
    """Which step was exported, where the best was looked for."""
    if not run.choice.is_file():
        return {}
    found: dict[str, Any] = json.loads(run.choice.read_text(encoding="utf-8"))
    looks = ", ".join(f"step {look['step']}: {look['score']:.2f}" for look in found["looks"])
    return {"Exported": f"step {found['best']}, the best by hooks.best ({looks})"}


def _triggers(data: dict[str, Any]) -> str:
    """The trigger, or each folder's."""
    concepts: dict[str, Any] = data.get("concepts", {})  # runs of earlier versions have none
    return ", ".join(f"{concept['trigger']} ({folder})" for folder, concept in concepts.items()) or data["trigger"]


def _pictures(run: RunDir) -> str:
    if not run.grid.is_file():
        return ""
    data = base64.b64encode(run.grid.read_bytes()).decode()
    return f"<h2>Samples</h2><img alt='sample grid' src='data:image/png;base64,{data}'>"


def _loss(run: RunDir) -> str:
    points = [(step["step"], step["loss"]) for step in read_jsonl(run.metrics)] if run.metrics.is_file() else []
    if len(points) < 2:
        return ""
    return f"<h2>Loss</h2>{curve([step for step, _ in points], [loss for _, loss in points])}"


def curve(steps: Sequence[int], losses: Sequence[float]) -> str:
    """An SVG of the loss over steps (at least two): every value faint, an exponential mean over them dark."""
    smooth = [losses[0]]
    for loss in losses[1:]:
        smooth.append(0.95 * smooth[-1] + 0.05 * loss)
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0

    def line(values: Sequence[float], colour: str) -> str:
        spots = " ".join(
            f"{MARGIN + (step - steps[0]) / (steps[-1] - steps[0]) * (WIDTH - MARGIN):.1f},"
            f"{(high - value) / span * (HEIGHT - MARGIN) + 10:.1f}"
            for step, value in zip(steps, values, strict=True)
        )
        return f"<polyline fill='none' stroke='{colour}' stroke-width='1.5' points='{spots}'/>"

    bottom = HEIGHT - MARGIN + 10
    return (
        f"<svg viewBox='0 0 {WIDTH + 10} {HEIGHT}' width='{WIDTH}' role='img' aria-label='loss over steps'>"
        f"<path d='M{MARGIN} 10V{bottom}H{WIDTH}' stroke='#999' fill='none'/>"
        f"<text x='0' y='16'>{high:.3g}</text><text x='0' y='{bottom}'>{low:.3g}</text>"
        f"<text x='{MARGIN}' y='{bottom + 16}'>step {steps[0]}</text>"
        f"<text x='{WIDTH}' y='{bottom + 16}' text-anchor='end'>step {steps[-1]}</text>"
        f"{line(losses, '#bcd')}{line(smooth, '#135')}</svg>"
    )


def _exports(run: RunDir) -> str:
    files = sorted(path for path in run.export.iterdir() if path.is_file()) if run.export.is_dir() else []
    if not files:
        return ""
    rows = "".join(
        f"<tr><td><code>export/{html.escape(path.name)}</code></td><td>{path.stat().st_size / 1024:.0f} KiB</td></tr>"
        for path in files
    )
    readme = run.export / "README.md"
    usage = f"<pre>{html.escape(readme.read_text(encoding='utf-8'))}</pre>" if readme.is_file() else ""
    return f"<h2>Files</h2><table>{rows}</table>{usage}"


def _skipped(run: RunDir) -> str:
    lines = list(read_jsonl(run.skipped)) if run.skipped.is_file() else []
    if not lines:
        return ""
    rows = "".join(
        f"<tr><td><code>{html.escape(str(line['file']))}</code></td><td>{html.escape(str(line['reason']))}</td></tr>"
        for line in lines
    )
    return f"<h2>Skipped pictures</h2><table>{rows}</table>"


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"
