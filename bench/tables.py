"""The tables of README.md and docs/benchmarks.md, from the results: python -m bench.tables [--check].

A page says what is made of a file of bench/results by `<!-- KIND FILE TABLE -->`, of the kinds quality, differences,
kinds (of concepts) and speed, or by `<!-- KIND FILE -->` of the kinds course and together; `<!-- end -->` comes after
it, and what is between is made anew.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from bench import course, quality, speed_tables
from bench.runs import OUT, ROOT
from trainer.rundir import atomic_write

PAGES = ("README.md", "docs/benchmarks.md")
KINDS = ("quality", "differences", "kinds", "together", "course", "speed")
_MARKED = re.compile(rf"(<!-- ({'|'.join(KINDS)}) ([\w.-]+)(?: ([\w ]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; status 1 if a table is not of its results"
    )
    options = parser.parse_args(argv)
    stale: list[str] = []
    for name in PAGES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if page(text) != text:
            stale.append(name)
            if not options.check:
                atomic_write(path, page(text))
    print(
        "\n".join(f"{name} {'is stale' if options.check else 'written'}" for name in stale) or "all tables are current"
    )
    return 1 if options.check and stale else 0


def page(text: str) -> str:
    """The page with the tables between its marks made anew."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{_table(found[2], found[3], found[4])}\n\n{found[5]}", text)


def _table(kind: str, file: str, name: str | None) -> str:
    results: dict[str, Any] = json.loads((OUT / file).read_text(encoding="utf-8"))
    if kind == "course":
        return course.table(results)
    if kind == "together":
        return quality.together(results)
    if kind == "speed":
        return speed_tables.TABLES[name or "targets"](results)
    of = {"quality": quality.table, "differences": quality.differences, "kinds": quality.by_kind}[kind]
    return of(results, name or "quickstart")


if __name__ == "__main__":
    sys.exit(main())
