"""What it costs that hooks can listen: CPU time of an update with none, with idle ones, and with one that hears all.

python -m bench.hooks BASE PICTURES writes bench/results/hooks.json. The three are measured in turns on one loaded
base, and in CPU time of one thread, so that a busy machine is hardly seen.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.args import TrainArgs
from trainer.hooks import Hook
from trainer.loop import Run, train
from trainer.run import opened

RESULT = Path(__file__).parent / "results" / "hooks.json"
ROUNDS, STEPS, IDLE = 24, 5, 10


class Everything(Hook):
    """Hears each event and answers nothing."""


def _ignore(self: Everything, *_: Any) -> None:
    """Of any event."""


for _name in [name for name in vars(Hook) if name.startswith("on_")]:
    setattr(Everything, _name, _ignore)


def measured(run: Run, hooks: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, float]]:
    """Figures of each set of hooks, by its name. Each round sees the same updates of the same run."""
    seconds: dict[str, list[float]] = {name: [] for name in hooks}
    for turn in range(ROUNDS + 1):
        for name, some in hooks.items():
            began = time.process_time()
            for _ in train(replace(run, hooks=some, steps=STEPS)):
                if turn:  # the first warms up
                    seconds[name].append(time.process_time() - began)
                began = time.process_time()
    return {
        name: {
            "median_cpu_ms": round(1000 * statistics.median(values), 3),
            "least_cpu_ms": round(1000 * min(values), 3),
            "updates": len(values),
        }
        for name, values in seconds.items()
    }


def main(argv: Sequence[str], say: Callable[[str], object] = print) -> None:
    base, pictures = argv
    with tempfile.TemporaryDirectory() as out:
        args = TrainArgs.model_validate(
            {
                "data": {"source": pictures},
                "model": {"base": base},
                "sample": {"steps": 1},
                "hooks": {"tensorboard": False},
                "runtime": {"out": out, "device": "cpu", "threads": 1, "batch_size": 2},
            }
        )
        with opened(args) as session:
            context = session.run.hooks[0].context  # type: ignore[attr-defined]
            hooks = {
                "none": [],
                f"{IDLE} that do nothing": [Hook(context) for _ in range(IDLE)],
                "1 that hears every event": [Everything(context)],
            }
            found = measured(session.run, hooks)
    RESULT.write_text(json.dumps({"updates": "tiny base, batch 2, 1 CPU thread", "hooks": found}, indent=2) + "\n")
    for name, figures in found.items():
        say(f"{name:26} {figures['median_cpu_ms']:8.2f} ms CPU")


if __name__ == "__main__":
    main(sys.argv[1:])
