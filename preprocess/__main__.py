"""python -m preprocess SOURCE --out DIR: shows what training would see of a folder or zip of pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from preprocess import PreprocessError, Report, build
from trainer.args import DataArgs
from trainer.rundir import RunDir, RunDirError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m preprocess", description=__doc__)
    parser.add_argument("source", help="folder or .zip of pictures; x.txt beside x.png is its caption")
    parser.add_argument("--out", type=Path, required=True, help="new folder for dataset.jsonl and the decoded pictures")
    parser.add_argument("--resolution", type=int, default=512, help="pixels; the area of a bucket is its square [512]")
    parser.add_argument("--step", type=int, default=64, help="pixels; sides of buckets are its multiples [64]")
    parser.add_argument("--trigger", default="TOK", help="word that stands for the concept [TOK]")
    parser.add_argument("--caption", default="a {trigger}", help="for pictures that come without one [a {trigger}]")
    parser.add_argument("--masks", action="store_true", help="read x.mask.png beside x.png")
    return parser


def _show(report: Report, out: Path) -> None:
    for item in report.items:
        size = f"{item.width}x{item.height} -> {item.bucket[0]}x{item.bucket[1]}"
        print(f"{item.name:24} {size:24} {'mask  ' if item.mask else ''}{item.caption}")
    for skip in report.skipped:
        print(f"left out {skip.file}: {skip.reason}")
    for note in report.notes:
        print(f"note: {note}")
    print(f"{len(report.items)} pictures, {len(report.skipped)} left out: {RunDir(out).dataset}")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 when the source or an option cannot be used; 1 when the disk fails."""
    options = _parser().parse_args(argv)
    if options.resolution < 1 or options.step < 1 or not options.trigger:
        print("preprocess: --resolution and --step must be 1 or more, and --trigger must not be empty", file=sys.stderr)
        return 2
    try:
        data = DataArgs.model_validate(
            {
                "source": options.source,
                "trigger": options.trigger,
                "caption": options.caption,
                "masks": options.masks,
            }
        )
        RunDir.create(options.out)
        report = build(options.source, options.out, data, options.resolution, options.step)
    except (PreprocessError, RunDirError) as error:
        print(f"preprocess: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"preprocess: {options.out} cannot be written: {error}", file=sys.stderr)
        return 1
    _show(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
