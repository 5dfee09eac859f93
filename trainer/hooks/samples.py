"""The sample grid: training pictures on top, then rows drawn before, during and after training.

Every picture is a file of its own in RUN/samples/<row>/, so that a resumed run draws only what is missing and the
grid is put together from the disk. The file's name holds a digest of what it was drawn from; rows drawn with other
prompts or settings are left on the disk and out of the grid.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import ExitStack, nullcontext
from pathlib import Path

from PIL import Image

from trainer import sampler
from trainer.events import RowDrawn
from trainer.hooks import Hook, presented
from trainer.listeners import Listeners
from trainer.loop import Run
from trainer.types import Step

BEFORE = "before"
TRAINING_ROWS = 2  # at most so many rows of training pictures


class Samples(Hook):
    """Fixed prompts and seeds: pictures in one column differ by the training alone."""

    own_errors = (OSError,)

    def on_start(self, run: Run) -> None:
        if self.context.start < run.steps:  # a hook may have ended the run, which goes on now
            for row in self.context.dir.samples.glob("after_*"):
                shutil.rmtree(row)
        if self.context.start == 0:
            with ExitStack() as base:
                for adapter in run.adapters:
                    base.enter_context(adapter.disabled())
                self._draw(run, BEFORE, 1.0)
            self._grid(run)

    def on_step(self, run: Run, step: Step) -> None:
        every = self.context.args.sample.every
        if every and step.step % every == 0 and step.step < run.steps:
            self._draw(run, _during(step.step), 1.0)
            self._grid(run)

    def on_end(self, run: Run) -> None:
        for strength in self._strengths(run):
            self._draw(run, _after(strength), strength)
        self._grid(run)

    def _strengths(self, run: Run) -> tuple[float, ...]:
        """Token rows alone have no strength to vary."""
        return self.context.args.sample.strengths if "adapter" in run.components else (1.0,)

    def after(self, run: Run) -> dict[float, list[Path]]:
        """Strength -> the pictures of the row drawn with it after training, in the order of the prompts."""
        rows = {strength: self._files(_after(strength)) for strength in self._strengths(run)}
        return {strength: files for strength, files in rows.items() if files and all(file.exists() for file in files)}

    def _files(self, row: str) -> list[Path]:
        """Where the pictures of a row are, one for each prompt."""
        args = self.context.args.sample
        files: list[Path] = []
        more = args.model_dump(include={"negative", "scheduler", "width", "height"}, exclude_defaults=True)
        for column, prompt in enumerate(args.prompts):
            made_from = [prompt, args.seed + column, args.steps, args.guidance, *([more] if more else [])]
            key = hashlib.sha256(json.dumps(made_from).encode())
            files.append(self.context.dir.samples / row / f"{column:02d}_{key.hexdigest()[:8]}.png")
        return files

    def _draw(self, run: Run, row: str, strength: float) -> None:
        args = self.context.args.sample
        files = self._files(row)
        if not files or all(file.exists() for file in files):
            return
        with nullcontext() if row == BEFORE else presented(run, "samples"):
            pictures = sampler.generate(
                run.family,
                args.prompts,
                seeds=[args.seed + column for column in range(len(files))],
                **sampler.settings(args),
                adapters=run.adapters,
                strength=strength,
            )
        for file, picture in zip(files, pictures, strict=True):
            save(picture, file)
        Listeners(run, run.hooks)(RowDrawn(row, tuple(files), tuple(self._files(BEFORE))))

    def _grid(self, run: Run) -> None:
        args = self.context.args.sample
        if not args.prompts:
            return
        during = range(args.every, run.steps, args.every) if args.every else ()
        rows = [("before training", self._files(BEFORE))]
        rows += [(f"step {step}", self._files(_during(step))) for step in during]
        rows += [(f"after, strength {strength:g}", self._files(_after(strength))) for strength in self._strengths(run)]
        drawn = [(label, files) for label, files in rows if all(file.exists() for file in files)]
        labelled = [*self._training(len(args.prompts)), *drawn]
        sampler.grid(
            [(label, [_open(f) for f in files]) for label, files in labelled], args.prompts, self.context.dir.grid
        )

    def _training(self, columns: int) -> list[tuple[str, list[Path]]]:
        """The first training pictures, as many as fill the grid's width once or twice."""
        files = [Path(name) for name in self.context.pictures[: TRAINING_ROWS * columns]]
        return [("training pictures", files[i : i + columns]) for i in range(0, len(files), columns)]


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG beside its place and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        picture.save(temporary, "PNG")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _during(step: int) -> str:
    return f"step_{step:06d}"


def _after(strength: float) -> str:
    return f"after_{strength:g}"
