"""python -m trainer.tools: inspect, convert, merge, extract, resize, strip, compare.

Exit status: 0; 1 when compare finds a difference, or the disk fails; 2 for what cannot be used; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainer import console, progress

if TYPE_CHECKING:
    import torch

    from trainer.models.skeleton import Skeleton
    from trainer.tools.lowrank import Size

LAYOUTS = ("kohya", "diffusers", "comfy", "peft")
DTYPES = ("fp32", "fp16", "bf16")
SHOWN = 10  # rows of a table that is cut


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    made = _Parser(prog="python -m trainer.tools", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    commands = made.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False)

    one = command("inspect", "what a file is: base, ranks, alphas, norms, who reads it, what it says of itself")
    one.add_argument("file", type=Path)
    one.add_argument("--layers", action="store_true", help="every layer, not only how many of a kind")
    one.add_argument("--json", action="store_true", help="all of it, for programs")

    one = command("convert", "the same updates in another layout; an embedding as A1111 and ComfyUI read it")
    one.add_argument("file", type=Path)
    one.add_argument("--to", choices=LAYOUTS, help="of updates (required for them)")
    _target(one)

    one = command("merge", "several files of updates into one, or into a checkpoint")
    one.add_argument("files", nargs="+", metavar="FILE[=STRENGTH[,PATTERN=STRENGTH...]]")
    one.add_argument("--into", type=Path, help="checkpoint, a file or a diffusers folder, that they are added to")
    one.add_argument("--to", choices=LAYOUTS, help="layout of one file [default: kohya]")
    _sized(one)
    _target(one)

    one = command("extract", "a LoRA from two checkpoints: what was trained between them")
    one.add_argument("base_file", type=Path, metavar="BASE")
    one.add_argument("tuned", type=Path, metavar="TUNED")
    one.add_argument("--conv-rank", type=int, help="of convolutions with kernels [default: as the others]")
    one.add_argument("--to", choices=LAYOUTS, help="layout [default: kohya]")
    _sized(one)
    _target(one, base=False)

    one = command("resize", "the same updates at a smaller rank")
    one.add_argument("file", type=Path)
    one.add_argument("--to", choices=LAYOUTS, help="layout [default: kohya]")
    _sized(one)
    _target(one)

    one = command("strip", "the same tensors without metadata")
    one.add_argument("file", type=Path)
    one.add_argument("--out", type=Path, required=True, help="file to write (required)")
    one.add_argument("--keep", action="append", default=[], help="key of the metadata that stays; give it again")

    one = command("compare", "two files, tensor by tensor; exit status 1 if they differ")
    one.add_argument("first", type=Path)
    one.add_argument("second", type=Path)
    one.add_argument("--updates", action="store_true", help="by what they add to the layers, whatever their names")
    one.add_argument("--tolerance", type=float, default=0.0, help="largest |a - b| that is no difference [default: 0]")
    one.add_argument("--base", help="as in convert, with --updates")
    one.add_argument("--config", help="as in convert, with --updates")
    one.add_argument("--json", action="store_true", help="all rows, for programs")
    return made


def _target(one: argparse.ArgumentParser, *, base: bool = True) -> None:
    one.add_argument("--out", type=Path, required=True, help="file, or for peft and checkpoints folder (required)")
    if base:
        one.add_argument("--base", help="sd15, sd2, sdxl or a base's path [default: what the file tells]")
    one.add_argument("--config", help="diffusers folder whose configs a single file has [default: as published]")
    one.add_argument("--dtype", choices=DTYPES, help="of what is written [default: the first file's]")


def _sized(one: argparse.ArgumentParser) -> None:
    one.add_argument("--rank", type=int, help="of what is written, at most")
    one.add_argument("--energy", type=float, help="share of the squared norm that is kept: 0.95")


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line says; the exit status."""
    options = parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    if not sys.stderr.isatty():  # there a bar shows it
        logging.getLogger(progress.LOGGER).setLevel(logging.INFO)
    console.hush_libraries()
    from trainer.layouts import LayoutError
    from trainer.tools.files import ToolError
    from trainer.types import BaseModelError

    try:
        return COMMANDS[options.command](options)
    except (LayoutError, ToolError, BaseModelError) as error:
        print(f"python -m trainer.tools: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"python -m trainer.tools: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("python -m trainer.tools: stopped; nothing was written", file=sys.stderr)
        return 130


def _inspect(options: argparse.Namespace) -> int:
    from trainer.tools.inspect import inspect

    facts = inspect(options.file)
    if options.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    layers: list[dict[str, Any]] = facts.pop("layers", [])
    strange: list[str] = facts.pop("not understood", [])
    for name, value in facts.items():
        if name == "kinds":
            for row in value:
                rank = f" of rank {row['rank']}, alpha {row['alpha']:g}" if row["rank"] else ""
                print(f"{'layers':16} {row['layers']} {row['kind']}{rank}")
        elif isinstance(value, dict):
            print(f"{name}:" if value else f"{name:16} none")
            for key, said in value.items():
                text = str(said)
                print(f"  {key:30} {text if len(text) <= 100 else text[:97] + '...'}")
        else:
            print(f"{name:16} {f'{value:.6g}' if isinstance(value, float) else value}")
    if strange:
        print(f"not understood: {len(strange)} tensors: {', '.join(strange[:SHOWN])}")
    for layer in layers if options.layers else []:
        rank = f"rank {layer['rank']} alpha {layer['alpha']:g}" if layer["rank"] else ""
        print(f"{layer['name']:90} {layer['kind']:5} {rank:20} {list(layer['shape'])!s:20} norm {layer['norm']:.6g}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from trainer.layouts import is_embedding
    from trainer.tools import convert

    _new(options)
    if options.file.is_file() and is_embedding(options.file):
        if options.to or options.dtype:
            raise _tool_error(f"{options.file} is an embedding, which has one layout; leave --to and --dtype out")
        convert.convert_embedding(options.file, options.out, base=options.base, config=options.config)
    else:
        if options.to is None:
            raise _tool_error(f"--to is missing: {', '.join(LAYOUTS)}")
        convert.convert(
            options.file,
            options.out,
            options.to,
            base=options.base,
            config=options.config,
            dtype=_dtype(options),
        )
    print(options.out)
    return 0


def _merge(options: argparse.Namespace) -> int:
    from trainer.tools import merge
    from trainer.tools.bases import Base

    _new(options)
    given = [merge.Given.parse(text) for text in options.files]
    if options.into is not None:
        unused = [name for name in ("rank", "energy", "to", "dtype", "base") if getattr(options, name) is not None]
        if unused:
            raise _tool_error(f"--into writes the checkpoint's own layout and dtype; leave --{unused[0]} out")
        bones = _bones(options, given[0].path, base=str(options.into))
        count = merge.into_base(given, Base(options.into, bones), bones, options.out)
        print(f"{options.out}: {count} layers changed")
        return 0
    bones, size = _bones(options, given[0].path), _size(options)
    base = Base(Path(options.base), bones) if options.base and Path(options.base).exists() else None
    cuts = merge.into_one(given, bones, options.out, options.to or "kohya", size=size, base=base, dtype=_dtype(options))
    kept = [cut.energy for cut in cuts.values() if cut is not None]
    said = f", {min(kept):.4f} to {max(kept):.4f} of each one's energy kept" if kept else ", exactly"
    print(f"{options.out}: {len(cuts)} layers{said}")
    return 0


def _extract(options: argparse.Namespace) -> int:
    from trainer.models import skeleton
    from trainer.tools import extract
    from trainer.tools.bases import Base
    from trainer.tools.lowrank import Size

    _new(options)
    size = _size(options)
    if size is None:
        raise _tool_error("--rank or --energy is missing: how large the LoRA may be")
    if options.conv_rank is not None and options.conv_rank < 1:
        raise _tool_error(f"--conv-rank is {options.conv_rank}, and must be 1 or more")
    bones = skeleton.of_base(str(options.base_file), options.config)
    other = skeleton.of_base(str(options.tuned), options.config)
    if other.name != bones.name:
        raise _tool_error(f"{options.base_file} is {bones.name} and {options.tuned} is {other.name}")
    conv = Size(options.conv_rank, options.energy) if options.conv_rank else None
    found = extract.extract(
        Base(options.base_file, bones),
        Base(options.tuned, bones),
        bones,
        options.out,
        options.to or "kohya",
        size,
        conv=conv,
        dtype=_dtype(options),
    )
    print(
        f"{options.out}: {len(found.kept)} layers of rank {extract.ranks(found)}; "
        f"{found.error:.4g} of the matrices' change is missing"
    )
    if found.left:
        print(f"left out, as no LoRA can say them: {len(found.left)} norms, biases and tables, {found.left[0]} for one")
    return 0


def _resize(options: argparse.Namespace) -> int:
    from trainer.tools import resize

    _new(options)
    size = _size(options)
    if size is None:
        raise _tool_error("--rank or --energy is missing: how large the updates may be")
    rows = resize.resize(
        options.file, _bones(options, options.file), options.out, options.to or "kohya", size, _dtype(options)
    )
    least = sorted(rows.items(), key=lambda row: row[1][2])
    for name, (before, after, energy) in least[:SHOWN]:
        print(f"{name:90} rank {before or 'full'} -> {after}  {energy:.4f} of its energy")
    print(f"{options.out}: {len(rows)} layers resized" + (", the most changed are above" if len(rows) > SHOWN else ""))
    return 0


def _strip(options: argparse.Namespace) -> int:
    from trainer.tools.strip import strip

    _new(options)
    gone = strip(options.file, options.out, options.keep)
    print(f"{options.out}: {len(gone)} keys are gone{': ' if gone else ''}{', '.join(gone)}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from trainer.tools import compare

    if not options.tolerance >= 0:
        raise _tool_error(f"--tolerance is {options.tolerance}, and must be 0 or more")
    if options.updates:
        found = compare.updates(options.first, options.second, _bones(options, options.first))
    else:
        if options.base or options.config:
            raise _tool_error("--base and --config are for --updates")
        found = compare.tensors(options.first, options.second)
    differ = found.differ(options.tolerance)
    if options.json:
        print(json.dumps({"differ": differ, **vars(found), "rows": [vars(row) for row in found.rows]}, indent=2))
        return int(differ)
    for row in found.rows[:SHOWN]:
        if row.largest:
            print(f"{row.name:90} max {row.largest:.3g}  mean {row.mean:.3g}  cosine {row.cosine:.6f}")
    for what, names in (
        (f"only in {options.first}", found.only_first),
        (f"only in {options.second}", found.only_second),
        ("of other shapes", found.shapes),
    ):
        if names:
            print(f"{what}: {len(names)}: {', '.join(names[:SHOWN])}")
    same = sum(row.largest == 0 for row in found.rows)
    print(f"{len(found.rows)} compared, {same} equal; they {'differ' if differ else 'are the same'}")
    return int(differ)


def _tool_error(message: str) -> Exception:
    from trainer.tools.files import ToolError

    return ToolError(message)


def _new(options: argparse.Namespace) -> None:
    """What exists stays as it is."""
    if options.out.exists():
        raise _tool_error(f"{options.out} exists already; choose another --out")


def _bones(options: argparse.Namespace, file: Path, base: str | None = None) -> Skeleton:
    from trainer.tools.files import skeleton_for

    return skeleton_for(file, base or options.base, options.config)


def _size(options: argparse.Namespace) -> Size | None:
    from trainer.tools.lowrank import Size

    if options.rank is not None and options.rank < 1:
        raise _tool_error(f"--rank is {options.rank}, and must be 1 or more")
    if options.energy is not None and not 0 < options.energy <= 1:
        raise _tool_error(f"--energy is {options.energy}, and must be above 0 and at most 1")
    return None if options.rank is None and options.energy is None else Size(options.rank, options.energy)


def _dtype(options: argparse.Namespace) -> torch.dtype | None:
    from trainer.tools.files import DTYPES

    return None if options.dtype is None else DTYPES[options.dtype]


COMMANDS = {
    "inspect": _inspect,
    "convert": _convert,
    "merge": _merge,
    "extract": _extract,
    "resize": _resize,
    "strip": _strip,
    "compare": _compare,
}

if __name__ == "__main__":
    sys.exit(main())
