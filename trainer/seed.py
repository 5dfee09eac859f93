"""Seeds as a pure function of what they are for, so that a run has no random state to save."""

from __future__ import annotations

import hashlib


def derive(seed: int, *purpose: int | str) -> int:
    """A seed in 0..2^63-1 that depends on `seed` and on every part of `purpose`, in order."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
