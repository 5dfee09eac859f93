"""Everything that one command draws: prompts x seeds, perhaps at several strengths, into files and grids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from trainer import sampler
from trainer.generate.find import GenerateError
from trainer.generate.painter import Look, Painter, Weighted
from trainer.generate.record import facts, free_names, save
from trainer.progress import Progress


@dataclass(frozen=True)
class Order:
    """A picture of every prompt with every seed."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    look: Look = field(default_factory=Look)
    strengths: Sequence[float] = (1.0,)  # all that is on the base, so many times as strong, one after the other
    grid: bool = False  # of each prompt, strengths x seeds
    begun: Mapping[str, str] = field(default_factory=dict[str, str])  # name -> sha256 of the start's files

    def pairs(self) -> list[tuple[str, int]]:
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


def carry_out(painter: Painter, weighted: Sequence[Weighted], order: Order, out: Path) -> Iterator[Path]:
    """Draws and writes; gives each file as soon as it is there, the grids last.

    Raises:
        GenerateError, SampleError, SchedulerError: it cannot be drawn so. Pictures from before that stay.
    """
    pairs, look = order.pairs(), order.look
    names: list[Path] = []  # no folder is made before there is a picture
    drawn: dict[tuple[str, int, float], Image.Image] = {}
    with Progress("drawing", len(pairs) * len(order.strengths) * look.steps, "step") as progress:
        for strength in order.strengths:
            painter.use([replace(one, strength=one.strength.times(strength)) for one in weighted])
            for first in range(0, len(pairs), look.batch):
                some = pairs[first : first + look.batch]
                pictures = painter.draw([p for p, _ in some], [seed for _, seed in some], look, progress.advance)
                names = names or free_names(out, _endings(order))[::-1]
                for (prompt, seed), picture in zip(some, pictures, strict=True):
                    file = names.pop()
                    save(picture, file, facts(painter, look, prompt, seed, picture.size, order.begun))
                    drawn |= {(prompt, seed, strength): picture} if order.grid else {}
                    yield file
    for prompt in order.prompts if order.grid else ():
        rows = [(f"strength {s:g}", [drawn[prompt, seed, s] for seed in order.seeds]) for s in order.strengths]
        file = names.pop()
        sampler.grid(rows, [f"seed {seed}" for seed in order.seeds], file, prompt)
        yield file


def _endings(order: Order) -> list[str]:
    pictures = [f"seed{seed}" for _, seed in order.pairs()] * len(order.strengths)
    return pictures + ["grid"] * len(order.prompts) * order.grid


def start(picture: Path, strength: float, mask: Path | None) -> tuple[sampler.Start, dict[str, str]]:
    """What drawings begin with, and the sha256 of its files by name.

    Raises:
        GenerateError: a file is no picture.
    """
    files = [picture, *([mask] if mask else [])]
    opened = [_opened(file) for file in files]
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return sampler.Start(opened[0], strength, opened[1] if mask else None), digests


def _opened(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).copy()
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise GenerateError(f"{file} is no picture that can be read: {error}") from error


def prompts_of(file: Path) -> list[str]:
    """A prompt a line; empty lines are left out.

    Raises:
        GenerateError: it cannot be read, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GenerateError(f"{file} cannot be read as a list of prompts: {error}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise GenerateError(f"{file} holds no prompt; write one a line")
    return found
