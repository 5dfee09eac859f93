"""python -m preprocess: from whatever people send to a dataset, without training; and removing what it keeps.

    python -m preprocess SOURCE --out DIR [--dry-run] [--option value ...]
    python -m preprocess clean DIR --stage NAME
    torchrun --nproc_per_node N -m preprocess SOURCE --out DIR    each of N processes decodes its share

Exit status: 0; 2 when the source or an option cannot be used; 1 when the disk fails, or a dry run finds problems; 130
when it was stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from preprocess import PreprocessError, Report, build
from preprocess.clean import STAGES, clean
from preprocess.survey import survey
from trainer import cli, console, progress, ranks
from trainer.args import DataArgs, RuntimeArgs
from trainer.registry import PartError
from trainer.rundir import RunDir, RunDirError

STOPPED = 130
_OWN = ("source", "resolution")  # of the data section: said by this parser itself


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line says; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with ranks.joined() as here, _stoppable():
            return _answered(words, here)
    except ranks.RanksError as error:
        print(f"preprocess: {error}", file=sys.stderr)
        return 1


def _answered(words: list[str], here: ranks.Ranks) -> int:
    try:
        if here.processes == 1:
            return _clean(words[1:]) if words[:1] == ["clean"] else _build(words, here)
        if words[:1] == ["clean"] or "--dry-run" in words:
            raise cli.CommandError("clean and --dry-run need one process: start them without the launcher")
        return _build(words, here)
    except KeyboardInterrupt:
        if here.fails(STOPPED):
            left = "nothing was left behind" if "--dry-run" in words else "the same command goes on from here"
            print(f"preprocess: stopped; {left}", file=sys.stderr)
        return STOPPED
    except ranks.OtherFailed as other:  # which says why
        return other.status
    except (PreprocessError, RunDirError, PartError, cli.CommandError) as error:
        if here.fails(2):
            for line in str(error).splitlines():
                print(f"preprocess: {line}", file=sys.stderr)
        return 2
    except ranks.RanksError as error:
        if here.fails(1):
            print(f"preprocess: {error}", file=sys.stderr)
        return 1


@contextmanager
def _stoppable() -> Generator[None]:
    """SIGTERM is as Ctrl-C, so that it too leaves no temporary folder and no process."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    options = cli.options()
    data = {name: field for name, field in options.items() if name.startswith("data.")}
    lines = [
        f"  --{name.removeprefix('data.')}: {field.description}"
        for name, field in data.items()
        if name.removeprefix("data.") not in _OWN
    ]
    parser = argparse.ArgumentParser(
        prog="python -m preprocess",
        usage="python -m preprocess SOURCE --out DIR [--dry-run] [--option value ...]\n"
        "       python -m preprocess clean DIR --stage NAME",
        description="Shows what training would see of a source of pictures.",
        epilog="\n".join(["every option of training's data section, without its data.:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help=str(data["data.source"].description).replace("%", "%%"))
    parser.add_argument("--out", type=Path, help="folder for dataset.jsonl, the sheet and the decoded pictures")
    parser.add_argument("--dry-run", action="store_true", help="say what would come of it, and leave nothing behind")
    parser.add_argument(
        "--resolution", default="512", help="pixels; the area of a bucket is its square; or several: 512,768 [512]"
    )
    parser.add_argument("--step", type=int, default=64, help="pixels; sides of buckets are its multiples [64]")
    return parser


def _build(words: list[str], here: ranks.Ranks) -> int:
    options, rest = _parser().parse_known_args(words)
    data = _data(options.source, [*rest, f"--resolution={options.resolution}"])
    if options.step < 1:
        raise cli.CommandError("--step must be 1 or more")
    if options.dry_run:
        logging.basicConfig(level=logging.ERROR)  # what is wrong is said once, at the end
        try:
            with tempfile.TemporaryDirectory(prefix="tempera-") as scratch:
                report = build(options.source, Path(scratch), data, data.resolution, options.step)
        except OSError as error:
            print(
                f"preprocess: {tempfile.gettempdir()} cannot hold the pictures: {error}; make room, or set TMPDIR to "
                "another folder",
                file=sys.stderr,
            )
            return 1
        return _told(report, data)
    if options.out is None:
        raise cli.CommandError("--out is missing: give the folder that the dataset is made in, or --dry-run")
    if here.first:
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        logging.getLogger("preprocess").setLevel(logging.INFO)
        if not sys.stderr.isatty():  # there a bar shows it
            logging.getLogger(progress.LOGGER).setLevel(logging.INFO)
        _claimed(options.out)
    here.barrier()
    try:
        with nullcontext() if here.first else console.silent():
            report = build(options.source, options.out, data, data.resolution, options.step, share=here.share)
    except OSError as error:
        if here.fails(1):
            print(f"preprocess: {options.out} cannot be written: {error}", file=sys.stderr)
        return 1
    if here.first:
        _show(report, options.out)
    return 0


def _data(source: str, rest: Sequence[str]) -> DataArgs:
    """The data section; a flag --x stands for training's --data.x."""
    flags = [f"--data.{word[2:]}" if word.startswith("--") else word for word in rest]
    flags = [flag.replace("--data.no-", "--no-data.", 1) for flag in flags]
    args = cli.parse([f"--data.source={source}", *flags]).args
    assert args is not None  # only a plain --resume has none
    return args.data


def _claimed(out: Path) -> None:
    """A folder to work in: new, empty, or one that an earlier call made. A training run keeps its pictures."""
    run = RunDir(out)
    if run.args.exists():
        raise RunDirError(f"{out} is a training run, whose dataset stays as it is; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        known = run.cache.is_dir() or not any(out.iterdir())
    except OSError as error:
        raise RunDirError(f"{out} cannot be used as a folder: {error.strerror}") from error
    if not known:
        raise RunDirError(f"{out} exists already and holds other things; choose another --out")


def _told(report: Report, data: DataArgs) -> int:
    found = survey(report)
    for fact in found.facts:
        print(fact)
    runtime = RuntimeArgs.model_validate({})
    steps = runtime.updates(data.regularisation.showings(found.pictures))
    print(f"{steps} steps of {runtime.batch_size} pictures, unless runtime.steps says else")
    for problem in found.problems:
        print(f"problem: {problem}")
    return 1 if found.problems else 0


def _show(report: Report, out: Path) -> None:
    for item in report.items:
        size = f"{item.width}x{item.height} -> {item.bucket[0]}x{item.bucket[1]}"
        print(f"{item.name:24} {size:24} {'mask  ' if item.mask else ''}{item.caption}")
    for skip in report.skipped:
        print(f"left out {skip.file}: {skip.reason}")
    run = RunDir(out)
    print(f"{len(report.items)} pictures, {len(report.skipped)} left out: {run.dataset}")
    if run.sheet().exists():
        print(f"look at them: {run.sheet()}")


def _clean(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m preprocess clean", description="Removes what one stage keeps.")
    parser.add_argument("folder", type=Path, help="a run directory, or an --out of python -m preprocess")
    parser.add_argument("--stage", required=True, choices=sorted(STAGES), help="whose files to remove")
    options = parser.parse_args(words)
    gone = clean(RunDir(options.folder), options.stage)
    print(f"{gone} files of {options.stage} removed from {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
