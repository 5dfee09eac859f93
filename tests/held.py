"""A hook that holds a run between two updates, so that a test can stop it there however busy the machine is."""

from __future__ import annotations

import os
import time
from pathlib import Path

from trainer.hooks import Hook
from trainer.loop import Run
from trainer.types import Step

HELD, AT = "TEMPERA_TESTS_HELD", 4  # the variable that names the file; the update after which the run is held


class Held(Hook):
    """After update AT makes the file that HELD names and waits until it is gone; without HELD it does nothing."""

    def on_step(self, run: Run, step: Step) -> None:
        if step.step == AT and HELD in os.environ:
            file = Path(os.environ[HELD])
            file.touch()
            deadline = time.monotonic() + 300
            while file.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
