"""Modules that are put off: nothing runs before it is used, and then it is the module that it would have been."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def ran(code: str, *, path: Path = ROOT) -> str:
    code = f"import sys; sys.path.insert(0, {str(path)!r})\nfrom trainer import later\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that says when it runs, imports a part of itself, and has another one that needs it."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/__init__.py").write_text(
        "print('ran')\nfrom slow import own\nvalue = 7\nclass Kind: pass\ndef double(n): return 2 * n\n"
    )
    (tmp_path / "slow/own.py").write_text("print('own')\nclass Part: pass\n")
    (tmp_path / "slow/part.py").write_text("import slow\nprint('part')\ndouble = 2 * slow.value\n")
    (tmp_path / "slow/free.py").write_text("print('free')\nname = 'free'\n")
    (tmp_path / "other.py").write_text(
        "import sys\nsys.modules[__name__] = type(sys)('other')\nsys.modules[__name__].x = 1\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("import slow", "end"),
        ("import slow, inspect; inspect.getmodule(lambda: 0); hasattr(slow, '__file__')", "end"),
        ("import slow; print(slow.value)", "ran own 7 end"),
        ("from slow import value; print(value)", "ran own 7 end"),
        ("import slow.part; print(slow.part.double)", "ran own part 14 end"),
        ("import slow\ntry: slow.nothing\nexcept AttributeError: print('none')", "ran own none end"),
        ("import slow.own; import slow; print(slow.own is sys.modules['slow.own'])", "ran own True end"),
        (
            "from slow.own import Part; import slow; print(Part is slow.own.Part, slow.own.__spec__.origin[-6:])",
            "ran own True own.py end",
        ),
    ],
)
def test_a_module_runs_once_when_it_is_used(package: Path, use: str, said: str) -> None:
    assert ran(f"later.put_off('slow')\n{use}\nprint('end')", path=package).split() == said.split()


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("import slow.free", "free end"),
        ("from slow import free; print(free.name)", "free free end"),
        (
            "from slow.own import Part; import slow; print(slow.Kind.__name__, slow.own.Part is Part)",
            "own ran Kind True end",
        ),
    ],
)
def test_a_package_that_is_entered_does_not_run(package: Path, use: str, said: str) -> None:
    assert ran(f"later.put_off('slow', inside=True)\n{use}\nprint('end')", path=package).split() == said.split()


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("print(isinstance(3, Kind), issubclass(int, Kind))", "False False"),
        (
            "import slow; slow.value; print(isinstance(slow.Kind(), Kind), isinstance(3, Kind), slow.Kind is Kind)",
            "ran own True False False",
        ),
        ("print(double(4))", "ran own 8"),
        (
            "import slow\nclass Mine(Kind): pass\nprint(Mine.__mro__[1] is slow.Kind, isinstance(Mine(), Kind))",
            "ran own True True",
        ),
        ("print(Kind.__name__)", "ran own Kind"),
        ("print(isinstance(3, Kind | int))", "ran own True"),
    ],
)
def test_a_name_that_is_known_stands_for_what_the_module_has(package: Path, use: str, said: str) -> None:
    put = "later.put_off('slow', known={name: later.named(name) for name in ('Kind', 'double')})"
    assert ran(f"{put}\nfrom slow import Kind, double\n{use}", path=package).split() == said.split()


def test_a_module_that_puts_another_one_into_its_place(package: Path) -> None:
    code = "later.put_off('other')\nimport other\nprint(other.x)\nimport other as new\nprint(new is other, other.x)"
    assert ran(code, path=package).split() == ["1", "False", "1"]


def test_what_is_done_after_it_ran(package: Path) -> None:
    code = "later.put_off('slow', after=lambda module: print('after', module.value))\nimport slow\nslow.double(1)"
    assert ran(code, path=package).split() == ["ran", "own", "after", "7"]


@pytest.mark.parametrize("name", ["no_such.thing", "json.no_such", "json.decoder.deeper"])
def test_what_is_not_installed_stays_so(name: str) -> None:
    assert ran(f"later.put_off({name!r})\nprint({name!r} in sys.modules)") == "False\n"
