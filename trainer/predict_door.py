"""What stands behind predict.py: its command line. `trainer.serve_door` is behind its Cog door.

Exit status: 0; 2 for input that cannot be used.
"""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainer import console, lean, progress, schedulers
from trainer.ranks import launched
from trainer.registry import PartError
from trainer.rundir import RunDirError

if TYPE_CHECKING:
    from trainer.generate import Look, Order

WEIGHTS = "PATH [STRENGTH] [BLOCK=STRENGTH ...] [trigger=WORD]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"predict.py: error: {message}\n")


class _Help(argparse.RawTextHelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return WEIGHTS if action.dest == "weights" else super()._format_args(action, default_metavar)


def parser() -> argparse.ArgumentParser:
    """The options of predict.py."""
    made = _Parser(
        prog="predict.py",
        description="Draws pictures with trained weights.",
        allow_abbrev=False,
        formatter_class=lambda prog: _Help(prog, max_help_position=34, width=120),
    )
    add = made.add_argument
    add(
        "--weights",
        action="append",
        nargs="+",
        required=True,
        help="run directory, .tar of one, a file or folder of docs/imports.md, or an http(s) URL (required);\n"
        "again for more. Behind it how strongly it acts [default: 1], and single blocks otherwise:\n"
        "down, mid, up, unet, text, tokens, or the beginning of a layer's name: down_blocks.1=0",
    )
    add("--prompt", action="append", default=[], help="again for more (this or --prompts is required)")
    add("--prompts", type=Path, metavar="FILE", help="prompts, one a line [default: none]")
    add("--out", type=Path, required=True, help="folder for the PNGs; what is in it is kept (required)")
    add("--base", help="base to draw on [default: the runs' own, or testbed/base for files]")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="precision of the base [default: the runs' own, or fp32]")
    add("--negative", default="", help="what to guide away from [default: nothing]")
    add("--seed", type=int, nargs="+", default=[0], help="every prompt is drawn with each of them [default: 0]")
    add("--n", type=int, help="with one seed: pictures for each prompt, with the next seeds [default: 1]")
    add("--batch-size", type=int, default=1, help="pictures drawn at once; more is faster on a GPU [default: 1]")
    add("--steps", type=int, default=25, help="denoising steps [default: 25]")
    names = textwrap.fill(", ".join(schedulers.SCHEDULERS), 84, break_on_hyphens=False)
    add("--scheduler", help=f"what samples [default: the base's own]:\n{names}")
    add("--guidance", type=float, default=3.0, help="classifier-free guidance [default: 3.0]")
    add("--guidance-rescale", type=float, default=0.0, help="0..1, less over-exposure by guidance [default: 0.0]")
    add("--strength", type=float, help="all weights so many times as strong [default: 1.0]")
    add(
        "--grid",
        type=float,
        nargs="+",
        metavar="STRENGTH",
        help="draw at each of these, and a grid of strengths x seeds for each prompt [default: none]",
    )
    add("--width", type=int, help="pixels [default: the base's own, or the picture's]")
    add("--height", type=int, help="pixels [default: the base's own, or the picture's]")
    add("--image", type=Path, help="picture to begin with [default: none]")
    add(
        "--image-strength",
        type=float,
        help="above 0, at most 1: how much of it is drawn anew [default: 0.8, with --mask 1.0]",
    )
    add("--mask", type=Path, help="of the picture: white is drawn, black stays [default: none]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="[default: auto]")
    add("--private-urls", action="store_true", help="URLs may lead into private networks [default: off]")
    return made  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Draws as the command line says; the exit status."""
    made = parser()
    options = made.parse_args(argv)
    mistake = _mistake(options)
    if mistake:
        made.error(mistake)
    rank, processes = launched()
    if processes > 1:
        said = "predict.py: error: one process draws the pictures: start it without the launcher\n"
        made.exit(2, said if rank == 0 else "")
    console.hush_libraries()
    logging.getLogger(progress.LOGGER).setLevel(logging.INFO)
    lean.start()
    from trainer.generate import GenerateError
    from trainer.sampler import SampleError
    from trainer.types import BaseModelError

    errors = GenerateError, BaseModelError, RunDirError, PartError, SampleError, schedulers.SchedulerError
    try:
        with console.shown():
            _draw(options)
    except errors as error:
        made.error(str(error))
    return 0


def _mistake(options: argparse.Namespace) -> str | None:
    """What cannot be, or would do nothing, of the options as typed."""
    lowest = {"n": 1, "steps": 1, "width": 1, "height": 1, "batch_size": 1, "guidance": 0}
    for name, least in lowest.items():
        value = getattr(options, name)
        if value is not None and not value >= least:
            return f"--{name.replace('_', '-')} is {value}, and must be {least} or more"
    if any(seed < 0 or seed >= 2**63 for seed in options.seed):
        return f"--seed is {' '.join(map(str, options.seed))}, and must be 0 or more, and below 2^63"
    if len(set(options.seed)) < len(options.seed):
        return f"--seed names one twice ({' '.join(map(str, options.seed))}), which would draw one picture twice"
    if not 0 <= options.guidance_rescale <= 1:
        return f"--guidance-rescale is {options.guidance_rescale:g}, and must be 0 to 1"
    if options.image_strength is not None and not 0 < options.image_strength <= 1:
        return f"--image-strength is {options.image_strength:g}, and must be above 0, and at most 1"
    both = [
        (not options.prompt and options.prompts is None, "there is nothing to draw: give --prompt or --prompts"),
        (options.n is not None and len(options.seed) > 1, "--n counts on from one --seed, and several are given"),
        (options.grid and options.strength is not None, "--grid and --strength both say how strong all is; give one"),
        (options.mask and not options.image, "--mask is of a picture: give it as --image"),
        (options.image_strength is not None and not options.image, "--image-strength does nothing without --image"),
        (
            options.guidance <= 1 and (options.negative or options.guidance_rescale),
            f"--guidance {options.guidance:g} guides nowhere, so --negative and --guidance-rescale would do nothing; "
            "take more than 1",
        ),
    ]
    return next((said for wrong, said in both if wrong), None)


def _draw(options: argparse.Namespace) -> None:
    from trainer import generate

    order = _order(options)
    parsed = [(words[0], *generate.parse(words[1:])) for words in options.weights]
    with ExitStack() as stack:  # what was downloaded or unpacked is needed until it is read
        paths = [stack.enter_context(generate.opened(path, private=options.private_urls)) for path, _, _ in parsed]
        found = [generate.find(path, trigger) for path, (_, _, trigger) in zip(paths, parsed, strict=True)]
        painter = generate.Painter(
            generate.base_of(found, options.base, options.dtype), generate.device(options.device)
        )
        learned = [painter.read(weights) for weights in found]
    weighted = [generate.Weighted(one, strength) for one, (_, strength, _) in zip(learned, parsed, strict=True)]
    for file in generate.carry_out(painter, weighted, order, options.out):
        sys.stdout.write(f"{file}\n")
        sys.stdout.flush()


def _order(options: argparse.Namespace) -> Order:
    from trainer import generate

    prompts = [*options.prompt, *(generate.prompts_of(options.prompts) if options.prompts else [])]
    seeds = options.seed if len(options.seed) > 1 else [options.seed[0] + index for index in range(options.n or 1)]
    strengths = tuple(options.grid or [1.0 if options.strength is None else options.strength])
    look, begun = _look(options)
    return generate.Order(tuple(dict.fromkeys(prompts)), seeds, look, strengths, bool(options.grid), begun)


def _look(options: argparse.Namespace) -> tuple[Look, Mapping[str, str]]:
    """How pictures are drawn, and the digests of what they begin with."""
    from trainer import generate

    start, begun = None, {}
    if options.image:
        usual = 1.0 if options.mask else 0.8
        strength = usual if options.image_strength is None else options.image_strength
        start, begun = generate.start(options.image, strength, options.mask)
    return (
        generate.Look(
            steps=options.steps,
            guidance=options.guidance,
            negative=options.negative,
            width=options.width,
            height=options.height,
            scheduler=None if options.scheduler is None else schedulers.known(options.scheduler),
            rescale=options.guidance_rescale,
            start=start,
            batch=options.batch_size,
        ),
        begun,
    )
