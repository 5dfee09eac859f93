"""The testbed's door: python -m testbed build | score RUN | zip CONCEPT FILE."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m testbed", description=(__doc__ or "").split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="make the base from nothing: about two hours on two cores, resumable")
    make.add_argument("--work", type=Path, default=HERE / "build", help="folder for what is made on the way")
    make.add_argument("--out", type=Path, default=HERE, help="folder that gets base/ and judges/")
    score = commands.add_parser("score", help="score a run that was trained on a held-out concept")
    score.add_argument("run", type=Path, help="run directory")
    score.add_argument("--concept", default="mushroom", help="held-out concept that the run was trained on")
    score.add_argument("--pictures", type=int, default=60, help="pictures of the concept; ordinary ones are 96")
    send = commands.add_parser("zip", help="write the training pictures of a held-out concept as a zip")
    send.add_argument("concept")
    send.add_argument("file", type=Path)
    send.add_argument("--pictures", type=int, default=10)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("testbed").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return {"build": _build, "score": _score, "zip": _zip}[args.command](args)


def _build(args: argparse.Namespace) -> int:
    from testbed.build import build

    build(args.work, args.out)
    return 0


def _score(args: argparse.Namespace) -> int:
    from testbed.runs import score_run

    scores = score_run(args.run, args.concept, args.pictures)
    for name, value in scores.rows().items():
        print(f"{name:20} {value:6.2f}" if name != "n" else f"{name:20} {value:3.0f}")
    path = args.run / "scores.json"
    path.write_text(json.dumps(scores.rows(), indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


def _zip(args: argparse.Namespace) -> int:
    from testbed.concepts import CONCEPTS, write_zip

    if args.concept not in CONCEPTS:
        print(f"{args.concept!r} is no held-out concept; there are {', '.join(CONCEPTS)}", file=sys.stderr)
        return 2
    write_zip(args.file, args.concept, args.pictures)
    print(args.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
