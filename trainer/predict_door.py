"""What stands behind predict.py: its command line, and the weights that its Cog door keeps loaded.

Exit status: 0; 2 for input that cannot be used.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainer import console
from trainer.ranks import launched
from trainer.registry import PartError
from trainer.rundir import RunDirError

if TYPE_CHECKING:
    from trainer.generate import Painter


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"predict.py: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The options of predict.py."""
    made = _Parser(prog="predict.py", description="Draws pictures with trained weights.", allow_abbrev=False)
    add = made.add_argument
    add("--weights", type=Path, required=True, help="run directory, a file or folder of docs/imports.md (required)")
    add("--prompt", action="append", required=True, help="give it again for more prompts (required)")
    add("--out", type=Path, required=True, help="folder for the PNGs; what is in it is kept (required)")
    add("--base", help="base to draw on [default: the run's own, or testbed/base for a file]")
    add("--trigger", help="word that stands for the embedding, where there is one [default: what the files say]")
    add("--negative", default="", help="what to guide away from [default: nothing]")
    add("--seed", type=int, default=0, help="of the first picture; the next have the next seeds [default: 0]")
    add("--n", type=int, default=1, help="pictures for each prompt [default: 1]")
    add("--steps", type=int, default=25, help="denoising steps [default: 25]")
    add("--guidance", type=float, default=3.0, help="classifier-free guidance [default: 3.0]")
    add("--strength", type=float, default=1.0, help="of the LoRA [default: 1.0]")
    add("--width", type=int, help="pixels [default: the base's own]")
    add("--height", type=int, help="pixels [default: the base's own]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="[default: auto]")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Draws as the command line says; the exit status."""
    made = parser()
    options = made.parse_args(argv)
    for name in ("n", "steps", "width", "height"):
        value = getattr(options, name)
        if value is not None and value < 1:
            made.error(f"--{name} is {value}, and must be 1 or more")
    if options.seed < 0:
        made.error(f"--seed is {options.seed}, and must be 0 or more")
    rank, processes = launched()
    if processes > 1:
        said = "predict.py: error: one process draws the pictures: start it without the launcher\n"
        made.exit(2, said if rank == 0 else "")
    console.hush_libraries()
    from trainer.generate import GenerateError
    from trainer.types import BaseModelError

    try:
        files = _draw(options)
    except (GenerateError, BaseModelError, RunDirError, PartError) as error:
        made.error(str(error))
    sys.stdout.write("".join(f"{file}\n" for file in files))
    return 0


def _draw(options: argparse.Namespace) -> list[Path]:
    from trainer import generate

    weights = generate.find(options.weights, options.base, options.trigger)
    painter = generate.Painter(generate.located(weights), generate.device(options.device))
    prompts = [prompt for prompt in options.prompt for _ in range(options.n)]
    settings = {name: getattr(options, name) for name in ("seed", "steps", "guidance", "strength", "negative")}
    pictures = painter.draw(prompts, **settings, width=options.width, height=options.height)
    files = generate.free_names(options.out, [options.seed + index for index in range(len(prompts))])
    facts = [{"prompt": prompt, **settings, "seed": options.seed + index} for index, prompt in enumerate(prompts)]
    generate.save(pictures, files, facts)
    return files


class Loaded:
    """The Cog door's memory: the weights of the last request stay on the base until others are asked for."""

    def __init__(self, default: str | None) -> None:
        self._default = default
        self._key: str | None = None
        self._painter: Painter | None = None

    def draw(self, inputs: Mapping[str, Any]) -> list[Path]:
        """PNG files in a new temporary folder."""
        from trainer import generate

        given = inputs["replicate_weights"] or self._default
        if given is None:
            raise generate.GenerateError("there are no weights: give replicate_weights, or start with COG_WEIGHTS")
        painter = self._load(Path(str(given)))
        count = int(inputs["num_outputs"])
        seed = int(inputs["seed"] or 0)
        pictures = painter.draw(
            [str(inputs["prompt"])] * count,
            seed=seed,
            steps=int(inputs["num_inference_steps"]),
            guidance=float(inputs["guidance_scale"]),
            strength=float(inputs["lora_scale"]),
            negative=str(inputs["negative_prompt"]),
            width=None if inputs["width"] is None else int(inputs["width"]),
            height=None if inputs["height"] is None else int(inputs["height"]),
        )
        files = generate.free_names(Path(tempfile.mkdtemp(prefix="tempera-")), [seed + i for i in range(count)])
        generate.save(pictures, files, [{"prompt": inputs["prompt"], "seed": seed + i} for i in range(count)])
        return files

    def _load(self, path: Path) -> Painter:
        from trainer import generate

        if not path.is_file():
            raise generate.GenerateError(f"the weights {path} are no file here; give a tar or .safetensors")
        key = hashlib.sha256(path.read_bytes()).hexdigest()
        if self._painter is None or self._key != key:
            self._painter, self._key = None, None  # a request that is cancelled midway leaves nothing half loaded
            weights = generate.find(unpack(path))
            self._painter = generate.Painter(generate.located(weights), generate.device("auto"), code=False)
            self._key = key
        return self._painter


def unpack(path: Path) -> Path:
    """A tar of training becomes a folder that opens as a run directory; anything else is given back."""
    if not tarfile.is_tarfile(path):
        return path
    folder = Path(tempfile.mkdtemp(prefix="tempera-"))
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")  # refuses links and paths that lead out
    return folder
