"""What a run is refused with."""

from __future__ import annotations


class RunError(ValueError):
    """Args that contradict the base, the machine or the run that they should continue. One sentence."""
