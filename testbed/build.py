"""Builds the base from nothing: pictures, text tower, autoencoder, denoiser, CLIP, judges, card."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from testbed import recipe
from testbed.assemble import assemble
from testbed.card import write_card
from testbed.clip import ClipTask
from testbed.fit import fit
from testbed.judge import JudgeTask

log = logging.getLogger("testbed")


def build(work: Path, out: Path) -> None:
    """Fits every part in `work`, a part that is there not again, and writes `out`/base and `out`/judges."""
    work.mkdir(parents=True, exist_ok=True)
    _each(recipe.make_pictures, work, "pixels")
    fit(recipe.Text(), work)
    fit(recipe.Vae(work), work)
    _each(recipe.make_latents, work, "latents")
    fit(recipe.UNet(work), work)
    fit(ClipTask(work), work)
    for knows in (True, False):
        fit(JudgeTask(knows), work)
    assemble(work, out)
    log.info("scoring the base")
    write_card(work, out)
    log.info("done: %s", out / "base")


def _each(make: Callable[[Path, str], None], folder: Path, kind: str) -> None:
    missing = [name for name in recipe.SETS if not (folder / f"{name}.{kind}.npy").exists()]
    if not missing:
        return
    log.info("making %s of %s", kind, ", ".join(missing))
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=_one_thread) as pool:
        list(pool.map(make, [folder] * len(missing), missing))


def _one_thread() -> None:
    torch.set_num_threads(1)
