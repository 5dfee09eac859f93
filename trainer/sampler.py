"""Prompts to pictures, through the family's stock pipeline, and pictures to a labelled grid."""

from __future__ import annotations

import io
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from trainer.rundir import atomic_write
from trainer.types import Adapter, ModelFamily

BATCH = 8  # pictures sampled at once
SMALLEST_CELL, LARGEST_CELL = 128, 384  # pixels
GAP, LABEL_WIDTH, FONT_SIZE = 6, 110, 14  # pixels


@torch.no_grad()
def generate(
    family: ModelFamily,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    negative: str = "",
    width: int | None = None,
    height: int | None = None,
    adapters: Sequence[Adapter] = (),
    strength: float = 1.0,
) -> list[Image.Image]:
    """One picture for each prompt, each a function of its own seed, whatever it is sampled beside.

    Adapters that are attached act in any case; those in `adapters` act with `strength`. Modes of modules and
    states of random generators are afterwards what they were.

    Args:
        width, height: pixels; the family's own resolution where None.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds were given; each prompt needs one seed")
    pictures: list[Image.Image] = []
    with ExitStack() as stack:
        stack.enter_context(_borrowed(family))
        for adapter in adapters:
            stack.enter_context(adapter.scaled(strength))
        pipe = family.pipeline()
        for start in range(0, len(prompts), BATCH):
            chunk = [family.expand(prompt) for prompt in prompts[start : start + BATCH]]
            result: Any = pipe(
                chunk,
                negative_prompt=[family.expand(negative)] * len(chunk),
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=width or family.resolution,
                height=height or family.resolution,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]],
            )
            pictures.extend(result.images)
    return pictures


@contextmanager
def _borrowed(family: ModelFamily) -> Generator[None]:
    """Everything in eval mode inside; modes and random states put back after."""
    roots = (family.denoiser, family.vae, *family.text_encoders.values())
    training = [module for root in roots for module in root.modules() if module.training]
    device = next(family.denoiser.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], path: Path) -> None:
    """Writes a PNG: a row of pictures behind each label, `columns` (the prompts) on top.

    All cells have one size, that of the largest picture within 128..384 pixels; a picture keeps its shape.
    """
    pictures = [picture for _, row in rows for picture in row]
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    cell = min(LARGEST_CELL, max(SMALLEST_CELL, *(max(picture.size) for picture in pictures)))
    count = max(len(columns), *(len(row) for _, row in rows))
    font = ImageFont.load_default(FONT_SIZE)
    titles = [_wrap(title, font, cell) for title in columns]
    top = GAP + max((len(lines) for lines in titles), default=0) * (FONT_SIZE + 4) + GAP
    size = (LABEL_WIDTH + count * (cell + GAP) + GAP, top + len(rows) * (cell + GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(titles):
        _write(draw, lines, LABEL_WIDTH + column * (cell + GAP), GAP, font)
    for index, (label, row) in enumerate(rows):
        y = top + index * (cell + GAP)
        _write(draw, _wrap(label, font, LABEL_WIDTH - 2 * GAP), GAP, y + GAP, font)
        for column, picture in enumerate(row):
            fitted = _fit(picture, cell)
            left = LABEL_WIDTH + column * (cell + GAP) + (cell - fitted.width) // 2
            sheet.paste(fitted, (left, y + (cell - fitted.height) // 2))
    png = io.BytesIO()
    sheet.save(png, "PNG")
    atomic_write(path, png.getvalue())


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """The picture with its longer side at `cell` pixels."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of whole words, none wider than `width` pixels unless a single word is."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, font: Any) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * (FONT_SIZE + 4)), line, fill="black", font=font)
