"""The shape of the tree, checked: imports point down only, each room keeps its nevers, ruff and pyright are content."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A file may import from lower levels and from its own room. A line holds rooms that do not know
# one another; only level 0 is a set of plain files that may. A new module needs a place here and in
# docs/architecture.md.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("trainer", "trainer.args", "trainer.types", "trainer.path", "trainer.registry", "trainer.rundir", "trainer.seed",
     "trainer.cli", "trainer.console", "trainer.extras", "trainer.progress", "trainer.share", "trainer.ranks",
     "trainer.view", "trainer.events", "trainer.updates", "trainer.lean", "trainer.later",
     "trainer.schedulers", "trainer.cog_inputs",
     "trainer.cog_schema", "trainer.scratch", "trainer.cancel", "trainer.hub"),
    ("trainer.models", "trainer.adapters", "trainer.objectives", "trainer.optim", "trainer.dataset", "trainer.cache",
     "trainer.layouts",
     "trainer.mixture",
    "trainer.concepts",
     "preprocess"),
    ("trainer.checkpoint", "trainer.export", "trainer.sampler", "trainer.environment", "trainer.engine",
     "trainer.material", "trainer.listeners", "trainer.callers"),
    ("trainer.loop", "trainer.report", "trainer.places", "trainer.parcel", "trainer.kept"),
    ("trainer.hooks",),
    ("trainer.run", "trainer.generate"),
    ("trainer.rehearsal",),
    ("trainer.__main__", "trainer.cog_door", "trainer.predict_door", "trainer.serve_door", "trainer.tools", "testbed"),
    ("train", "predict", "bench"),
)  # fmt: skip
ROOMS = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
OURS = {room.partition(".")[0] for room in ROOMS}
NO_TORCH = (
    "trainer.args",
    "trainer.registry",
    "trainer.rundir",
    "trainer.seed",
    "trainer.cli",
    "trainer.share",
    "trainer.progress",
    "trainer.ranks",
    "trainer.view",
    "trainer.schedulers",
    "preprocess",
)
LONGEST_FUNCTION = 90  # lines; 3-40 are usual


def sources() -> list[Path]:
    folders = (ROOT / name for name in ("trainer", "preprocess", "testbed", "bench"))
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room that holds `module`. The bare package `trainer` holds nothing but itself."""
    if module in ROOMS:
        return module
    parent = module.rpartition(".")[0]
    return room_of(parent) if parent and parent != "trainer" else None


def imports(tree: ast.AST, module: str, *, package: bool) -> Iterator[tuple[int, str]]:
    """(line, module) of every import anywhere in a file; `from trainer import loop` names trainer.loop."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: None if package and node.level == 1 else -(node.level - package)]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if (ROOT / full.replace(".", "/")).exists() or is_module(full) else base


def is_module(name: str) -> bool:
    return (ROOT / name.replace(".", "/")).with_suffix(".py").exists()


def wrong_imports(source: str, module: str, *, package: bool = False) -> list[str]:
    """One sentence for each import of `source` that points up, sideways, or into no room."""
    own = room_of(module)
    if own is None:
        return [f"{module} belongs to no room: give it a place in LEVELS and in docs/architecture.md"]
    wrong: list[str] = []
    for line, target in imports(ast.parse(source), module, package=package):
        if target.partition(".")[0] not in OURS:
            continue
        room = room_of(target)
        if room is None:
            wrong.append(f"{module}:{line} imports {target}, which belongs to no room")
        elif room != own and ROOMS[room] >= ROOMS[own] and not ROOMS[room] == ROOMS[own] == 0:
            where = "up" if ROOMS[room] > ROOMS[own] else "sideways"
            wrong.append(f"{module}:{line} imports {target}, which points {where}")
    return wrong


def test_imports_point_down() -> None:
    wrong = [
        sentence
        for path in sources()
        for sentence in wrong_imports(
            path.read_text(encoding="utf-8"), module_of(path), package=path.stem == "__init__"
        )
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "sentence"),
    [
        ("trainer.optim", "from trainer import run", "points up"),
        ("trainer.optim", "def f():\n    import trainer.loop", "points up"),
        ("trainer.models.sd15", "from trainer.adapters.lora import LoRA", "points sideways"),
        ("trainer.models.sd15", "from ..adapters import ADAPTERS", "points sideways"),
        ("trainer.objectives", "from trainer.dataset import Dataset", "points sideways"),
        ("trainer.args", "import train", "points up"),
        ("trainer.loop", "if TYPE_CHECKING:\n    from trainer.hooks import Hook", "points up"),
        ("trainer.secret", "", "belongs to no room"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str, sentence: str) -> None:
    assert any(sentence in wrong for wrong in wrong_imports(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trainer.models.sd15", "from trainer.models import load\nfrom trainer.types import Cond\nimport torch"),
        ("trainer.types", "from trainer.path import NoisePath"),
        ("trainer.run", "import preprocess\nfrom trainer import cache\nfrom trainer.models import FAMILIES"),
        ("preprocess", "from preprocess.ingest import ingest\nfrom trainer.args import DataArgs"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert wrong_imports(source, module) == []


@pytest.mark.parametrize("module", NO_TORCH)
def test_what_reads_options_and_files_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"{module} imports torch"


def test_objectives_leave_the_update_to_the_loop() -> None:
    for path in (ROOT / "trainer/objectives").glob("*.py"):
        calls = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        assert not calls & {"backward", "zero_grad"}, path


def test_the_loop_names_no_part() -> None:
    names: set[str] = set()
    for room in ("models", "adapters", "objectives", "hooks"):
        names |= {path.stem for path in (ROOT / "trainer" / room).glob("*.py")} - {"__init__", "checkpoints", "metrics"}
    names |= {"lora", "textual_inversion", "adamw", "prodigy"}
    words = set(re.findall(r"\w+", (ROOT / "trainer/loop.py").read_text("utf-8").lower()))
    assert not words & names - {"load", "progress", "samples", "noise", "levels", "denoise"}


def test_functions_can_be_read_at_a_sitting() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.body[0].lineno + 2) > LONGEST_FUNCTION  # Cog's signatures are long
    ]
    assert not long, "\n".join(long)


def tool(*command: str) -> str:
    """The output of a tool of the environment; empty if it is content."""
    # pyright would otherwise ask the network whether it is the newest.
    env = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, env=env, check=False
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_ruff_check() -> None:
    output = tool("ruff", "check", "--output-format", "concise", ".")
    assert not output, output


def test_ruff_format() -> None:
    output = tool("ruff", "format", "--check", ".")
    assert not output, output


def test_pyright() -> None:
    output = tool("pyright", "--pythonpath", sys.executable)
    assert not output, output


def test_every_room_is_in_the_architecture_page() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    names = [room.rpartition(".")[2] for room in ROOMS if room != "trainer"]
    assert not [name for name in names if not re.search(rf"\b{name}\b", page)]
