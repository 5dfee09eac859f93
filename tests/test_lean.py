"""Imports that are put off: nothing runs before it is used, and then it is the module that it would have been."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def ran(code: str, *, path: Path = ROOT) -> str:
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that says when it runs, and needs itself for what is in it."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/__init__.py").write_text("print('ran')\nvalue = 7\n")
    (tmp_path / "slow/part.py").write_text("import slow\nprint('part')\ndouble = 2 * slow.value\n")
    return tmp_path


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("import slow", "end"),
        ("import slow, inspect; inspect.getmodule(lambda: 0); hasattr(slow, '__file__')", "end"),
        ("import slow; print(slow.value)", "ran 7 end"),
        ("from slow import value; print(value)", "ran 7 end"),
        ("import slow.part; print(slow.part.double)", "ran part 14 end"),
        ("import slow\ntry: slow.nothing\nexcept AttributeError: print('none')", "ran none end"),
    ],
)
def test_a_module_runs_when_it_is_used(package: Path, use: str, said: str) -> None:
    assert (
        ran(f"from trainer import lean\nlean.later(['slow'])\n{use}\nprint('end')", path=package).split()
        == said.split()
    )


def test_what_is_not_installed_stays_so() -> None:
    assert (
        ran("from trainer import lean\nlean.later(['no_such.thing'])\nprint('no_such.thing' in sys.modules)")
        == "False\n"
    )


def test_libraries_leave_out_what_is_not_used_and_schedulers_still_find_it() -> None:
    code = """
from trainer import lean
lean.imports()
from diffusers import DPMSolverMultistepScheduler, LMSDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextModel
print('scipy.stats._stats_py' in sys.modules, 'scipy' in sys.modules)
from transformers.utils import is_scipy_available
made = DPMSolverMultistepScheduler(use_beta_sigmas=True)
made.set_timesteps(4)
LMSDiscreteScheduler().set_timesteps(4)
print(is_scipy_available(), 'scipy.stats._stats_py' in sys.modules)
"""
    assert ran(code).split() == ["False", "True", "True", "True"]
