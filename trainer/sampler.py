"""Prompts to pictures, through the family's stock pipelines, and pictures to a labelled grid."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from trainer.args import SampleArgs
from trainer.rundir import atomic_write
from trainer.types import Adapter, ModelFamily, Task

BATCH = 8  # pictures sampled at once
SMALLEST_CELL, LARGEST_CELL = 128, 384  # pixels
GAP, LABEL_WIDTH, FONT_SIZE, LINE = 6, 110, 14, 18  # pixels


class SampleError(ValueError):
    """Pictures that cannot be drawn as asked. One sentence."""


@dataclass(frozen=True)
class Start:
    """A picture to begin with: it is made noisy as after `strength` of the path, and drawn from there."""

    picture: Image.Image
    strength: float  # above 0, at most 1: all of the path
    mask: Image.Image | None = None  # white is drawn, black stays to the last bit; of the picture's size

    @property
    def task(self) -> Task:
        return "image" if self.mask is None else "inpaint"


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
    scheduler: str | None = None,
    rescale: float = 0.0,
    start: Start | None = None,
    adapters: Sequence[Adapter] = (),
    strength: float = 1.0,
    batch: int = BATCH,
    drawn: Callable[[int], object] = lambda _: None,
) -> list[Image.Image]:
    """One picture for each prompt, each a function of its own seed, whatever it is sampled beside.

    Sums of another batch size round differently: by 1 of 255 at most, and not at all with a `batch` of 1.
    Adapters that are attached act in any case; those in `adapters` act with `strength`. Modes of modules and
    states of random generators are afterwards what they were.

    Args:
        width, height: pixels; where None the start's own, and without a start the family's resolution.
        scheduler: of `trainer.schedulers`; the base's own where None.
        rescale: 0..1, how far guidance is brought back to the prediction's own spread (arXiv 2305.08891, 3.4).
        batch: pictures sampled at once.
        drawn: told how many steps of a picture were made since the last time; there are `steps` for each picture.

    Raises:
        SampleError: a side, a start or a number of steps cannot be drawn.
        SchedulerError: the scheduler is unknown, or does not fit the base.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds were given; each prompt needs one seed")
    size = sides(family, width, height, start)
    pipe = _pipeline(family, start, scheduler, steps, rescale)
    more: dict[str, Any] = {"guidance_rescale": rescale} if rescale else {}
    pictures: list[Image.Image] = []
    with ExitStack() as stack:
        stack.enter_context(_borrowed(family))
        for adapter in adapters:
            stack.enter_context(adapter.scaled(strength))
        for first in range(0, len(prompts), batch):
            chunk = [family.expand(prompt) for prompt in prompts[first : first + batch]]
            result: Any = pipe(
                chunk,
                negative_prompt=[family.expand(negative)] * len(chunk),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[first : first + batch]],
                callback_on_step_end=_telling(drawn, len(chunk) * steps),
                **_place(size, start, len(chunk)),
                **more,
            )
            pictures.extend(_pasted(picture, size, start) for picture in result.images)
    return pictures


def settings(args: SampleArgs) -> dict[str, Any]:
    """What `generate` is told of a run's samples, beside prompts and seeds."""
    return {name: getattr(args, name) for name in ("steps", "guidance", "negative", "width", "height", "scheduler")}


def sides(family: ModelFamily, width: int | None, height: int | None, start: Start | None = None) -> tuple[int, int]:
    """Width and height in pixels of what is drawn.

    Raises:
        SampleError: one of them is no multiple of the family's `picture_step`.
    """
    own = start.picture.size if start else (family.resolution, family.resolution)
    step, chosen = family.picture_step, (width or own[0], height or own[1])
    if any(side % step or side < step for side in chosen):
        fit = [max(step, side - side % step) for side in chosen]
        raise SampleError(
            f"{chosen[0]} x {chosen[1]} pixels cannot be drawn, for both sides must be divisible by {step}; take a "
            f"width of {fit[0]} and a height of {fit[1]}"
        )
    return chosen


def check(family: ModelFamily, steps: int, width: int | None, height: int | None, scheduler: str | None) -> None:
    """Whether pictures of prompts can be drawn so.

    Raises:
        SampleError, SchedulerError: as `generate` would.
    """
    sides(family, width, height)
    _pipeline(family, None, scheduler, steps, 0.0)


def _pipeline(family: ModelFamily, start: Start | None, scheduler: str | None, steps: int, rescale: float) -> Any:
    """The family's pipeline, once it is known that it can do what is asked."""
    pipe = family.pipeline(start.task if start else "text", scheduler)
    if rescale and "guidance_rescale" not in inspect.signature(pipe.__call__).parameters:
        raise SampleError(
            f"{type(pipe).__name__} has no guidance rescale, and {rescale:g} was given; leave it out with a picture "
            "to begin with"
        )
    try:
        pipe.scheduler.set_timesteps(steps)
    except ValueError as error:
        said = str(error).strip().splitlines()[0]
        raise SampleError(f"{type(pipe.scheduler).__name__} makes no {steps} steps: {said}") from error
    if start is None:
        return pipe
    if int(steps * start.strength) < 1:
        raise SampleError(
            f"{start.strength:g} of {steps} steps is none, so the picture would stay as it is; give more of either"
        )
    if start.mask is not None and start.mask.size != start.picture.size:
        raise SampleError(
            f"the mask has {start.mask.width} x {start.mask.height} pixels, and the picture {start.picture.width} x "
            f"{start.picture.height}; they must be of one size"
        )
    return pipe


def _place(size: tuple[int, int], start: Start | None, count: int) -> dict[str, Any]:
    """What a pipeline is told of the size, and of what it begins with."""
    sized = {"width": size[0], "height": size[1]}
    if start is None:
        return sized
    begun = {"image": [_fitted(start.picture.convert("RGB"), size)] * count, "strength": start.strength}
    if start.mask is None:
        return begun
    return {**begun, **sized, "mask_image": [_fitted(start.mask.convert("L"), size)] * count}


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of the picture, scaled to fill the size; itself where it has that size."""
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def _pasted(picture: Image.Image, size: tuple[int, int], start: Start | None) -> Image.Image:
    """The start's own pixels where its mask is black: the autoencoder would change them a little."""
    if start is None or start.mask is None:
        return picture
    return Image.composite(picture, _fitted(start.picture.convert("RGB"), size), _fitted(start.mask.convert("L"), size))


def _telling(drawn: Callable[[int], object], total: int) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """A callback of diffusers that tells of `total` steps in all, however many the scheduler makes of them."""
    told = 0

    def tell(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal told
        now = total * (index + 1) // pipe.num_timesteps
        drawn(now - told)
        told = now
        return tensors

    return tell


@contextmanager
def _borrowed(family: ModelFamily) -> Generator[None]:
    """Everything awake and in eval mode inside; modes and random states put back after."""
    roots = (family.denoiser, family.vae, *family.text_encoders.values())
    training = [module for root in roots for module in root.modules() if module.training]
    device = next(family.denoiser.parameters()).device
    with family.awake(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], path: Path, title: str = ""
) -> None:
    """Writes a PNG: a row of pictures behind each label, `columns` (prompts, or seeds) on top, `title` above all.

    All cells have one size, that of the largest picture within 128..384 pixels; a picture keeps its shape.
    """
    pictures = [picture for _, row in rows for picture in row]
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    cell = min(LARGEST_CELL, max(SMALLEST_CELL, *(max(picture.size) for picture in pictures)))
    count = max(len(columns), *(len(row) for _, row in rows))
    font = ImageFont.load_default(FONT_SIZE)
    wide = LABEL_WIDTH + count * (cell + GAP) + GAP
    heading = _wrap(title, font, wide - 2 * GAP)
    above = len(heading) * LINE + (GAP if heading else 0)
    titles = [_wrap(column, font, cell) for column in columns]
    top = above + GAP + max((len(lines) for lines in titles), default=0) * LINE + GAP
    size = (wide, top + len(rows) * (cell + GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, heading, GAP, GAP, font)
    for column, lines in enumerate(titles):
        _write(draw, lines, LABEL_WIDTH + column * (cell + GAP), above + GAP, font)
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
        draw.text((x, y + number * LINE), line, fill="black", font=font)
