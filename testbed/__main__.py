"""The testbed's door: python -m testbed build | score RUN | zip CONCEPT FILE."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer import console

HERE = Path(__file__).parent
ORDINARY = 96  # pictures of ordinary prompts that a run is scored with, before and after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m testbed", description=(__doc__ or "").split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="make a base from nothing: about two hours on two cores, resumable")
    make.add_argument("--base", choices=("sd15", "sdxl"), default="sd15", help="sdxl goes on from sd15's parts")
    make.add_argument("--work", type=Path, default=HERE / "build", help="folder for what is made on the way")
    make.add_argument("--out", type=Path, default=HERE, help="folder that gets base/ and judges/, or base-sdxl/")
    score = commands.add_parser("score", help="score a run that was trained on a held-out concept")
    score.add_argument("run", type=Path, help="run directory")
    score.add_argument("--concept", default="mushroom", help="held-out concept that the run was trained on")
    score.add_argument("--trigger", default="TOK", help="word that it was trained under [default: TOK]")
    score.add_argument(
        "--pictures", type=int, default=60, help=f"pictures of the concept; ordinary ones are {ORDINARY}"
    )
    send = commands.add_parser("zip", help="write the training pictures of a held-out concept as a zip")
    send.add_argument("concept")
    send.add_argument("file", type=Path)
    send.add_argument("--pictures", type=int, default=10)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("testbed").setLevel(logging.INFO)
    console.hush_libraries()
    return {"build": _build, "score": _score, "zip": _zip}[args.command](args)


def _build(args: argparse.Namespace) -> int:
    from testbed.build import build, build_sdxl

    try:
        {"sd15": build, "sdxl": build_sdxl}[args.base](args.work, args.out)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from what is in {args.work}", file=sys.stderr)
        return 130
    return 0


def _score(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    from testbed.runs import score_run
    from trainer.generate import GenerateError
    from trainer.rundir import RunDirError
    from trainer.types import BaseModelError

    if (status := _unknown(args.concept)) is not None:
        return status
    transformers_logging.disable_progress_bar()  # for the loading of a small model, between our own bar's lines
    torch.set_num_threads(1)  # a model this small runs slower on more
    try:
        with tqdm(total=args.pictures + 2 * ORDINARY + 8, desc="scoring", unit="picture", mininterval=1) as bar:
            scores = score_run(args.run, args.concept, args.pictures, ORDINARY, bar.update, args.trigger)
    except (RunDirError, GenerateError, BaseModelError) as error:
        print(f"testbed: error: {error}", file=sys.stderr)
        return 2
    for name, value in scores.rows().items():
        print(f"{name:20} {value:6.2f}" if name != "n" else f"{name:20} {value:3.0f}")
    path = args.run / "scores.json"
    path.write_text(json.dumps(scores.rows(), indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


def _zip(args: argparse.Namespace) -> int:
    from testbed.concepts import write_zip

    if (status := _unknown(args.concept)) is not None:
        return status
    write_zip(args.file, args.concept, args.pictures)
    print(args.file)
    return 0


def _unknown(concept: str) -> int | None:
    """The exit status for a concept that there is not."""
    from testbed.concepts import CONCEPTS

    if concept in CONCEPTS:
        return None
    print(f"testbed: error: {concept!r} is no held-out concept; there are {', '.join(CONCEPTS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
