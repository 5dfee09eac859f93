"""Builds the bases from nothing: pictures, text tower, autoencoder, denoiser, CLIP, judges, card."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from testbed import recipe, sdxl_recipe
from testbed.assemble import assemble, assemble_sdxl
from testbed.card import write_card
from testbed.clip import ClipTask
from testbed.fit import fit
from testbed.judge import JudgeTask
from testbed.sdxl_card import write_sdxl_card

log = logging.getLogger("testbed")


def build(work: Path, out: Path) -> None:
    """Fits every part in `work`, a part that is there not again, and writes `out`/base and `out`/judges."""
    _first(work)
    fit(ClipTask(work), work)
    for knows in (True, False):
        fit(JudgeTask(knows), work)
    assemble(work, out)
    log.info("scoring the base")
    write_card(work, out)
    log.info("done: %s", out / "base")


def build_sdxl(work: Path, out: Path) -> None:
    """The same for `out`/base-sdxl, which goes on from the first base's parts; its card needs `out`/judges."""
    _first(work)
    fit(sdxl_recipe.Text2(), work)
    _each(sdxl_recipe.make_pictures, work, "pixels", sdxl_recipe.SETS)
    _each(recipe.make_latents, work, "latents", sdxl_recipe.SETS)
    fit(sdxl_recipe.UNetXL(work), work)
    assemble_sdxl(work, out)
    log.info("scoring the base")
    write_sdxl_card(work, out)
    log.info("done: %s", out / "base-sdxl")


def _first(work: Path) -> None:
    """What both bases begin with."""
    work.mkdir(parents=True, exist_ok=True)
    _each(recipe.make_pictures, work, "pixels", recipe.SETS)
    fit(recipe.Text(), work)
    fit(recipe.Vae(work), work)
    _each(recipe.make_latents, work, "latents", recipe.SETS)
    fit(recipe.UNet(work), work)


def _each(make: Callable[[Path, str], None], folder: Path, kind: str, names: Iterable[str]) -> None:
    missing = [name for name in names if not (folder / f"{name}.{kind}.npy").exists()]
    if not missing:
        return
    log.info("making %s of %s", kind, ", ".join(missing))
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=_one_thread) as pool:
        list(pool.map(make, [folder] * len(missing), missing))


def _one_thread() -> None:
    torch.set_num_threads(1)
