"""Packages that only some options need, and what to type to have them."""

from __future__ import annotations

# What it is for -> what pip installs. requirements-dev.in has the same versions.
EXTRAS = {
    "heic": "pillow-heif==1.8.1",
    "hub": "datasets==5.2.0",
    "optimizers": "pytorch-optimizer==4.1.0",
    "schedulefree": "schedulefree==1.4.1",
    "prodigy-plus": "prodigy-plus-schedule-free==2.0.1",
    "bitsandbytes": "bitsandbytes==0.50.2",
}


def needed(extra: str) -> str:
    """The end of a sentence about something that cannot be done without this extra."""
    return f"which needs {EXTRAS[extra].partition('==')[0]}, and it is not installed: pip install {EXTRAS[extra]!r}"
