"""The environment: installed once, from locks that are whole, with a clear word when it cannot be made."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-dev.lock")


def load_installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tempera_install", ROOT / ".ci/install.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


installer = load_installer()


def pins(name: str) -> dict[str, str]:
    """Normalised project name -> version, from a requirements file; of several, the one for the oldest Python."""
    found = re.findall(r"^([\w.-]+)(?:\[\w+\])?==([^\s;\\]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", project).lower(): version for project, version in reversed(found)}


def wheel(folder: Path, name: str, version: str) -> Path:
    """A real wheel with one module in it."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for file, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(content)}\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(file, content)
    return path


def lock(root: Path, built: Path, digest: str | None = None) -> None:
    name, version = built.name.split("-")[:2]
    digest = digest or hashlib.sha256(built.read_bytes()).hexdigest()
    (root / "requirements.lock").write_text(f"{name}=={version} \\\n    --hash=sha256:{digest}\n")


def installed(venv: Path, name: str) -> str:
    command = [str(installer.interpreter(venv)), "-c", f"import {name}; print({name}.version)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_it_installs_once_and_again_only_when_the_lock_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wheels, venv = tmp_path / "wheels", tmp_path / "env"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    (tmp_path / "requirements.in").write_text("torch==0.1\ndemo\n")
    wheel(wheels, "torch", "0.1")
    lock(tmp_path, wheel(wheels, "demo", "1.0"))

    installer.create(venv)
    installer.check(venv)
    assert installer.install(venv, tmp_path, "requirements.lock") is True
    assert (installed(venv, "torch"), installed(venv, "demo")) == ("0.1", "1.0")

    shutil.move(wheels, tmp_path / "away")
    capfd.readouterr()
    assert installer.install(venv, tmp_path, "requirements.lock") is False
    assert capfd.readouterr().out == ""
    shutil.move(tmp_path / "away", wheels)

    newer = wheel(wheels, "demo", "2.0")
    lock(tmp_path, newer, digest="0" * 64)
    with pytest.raises(installer.SetupError, match=r"requirements\.lock failed"):
        installer.install(venv, tmp_path, "requirements.lock")
    assert not list(venv.glob(".installed-*")), "a failed install must not look finished"
    lock(tmp_path, newer)
    assert installer.install(venv, tmp_path, "requirements.lock") is True
    assert installed(venv, "demo") == "2.0"


def test_an_environment_that_does_not_work_is_named(tmp_path: Path) -> None:
    python = installer.interpreter(tmp_path)
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho 3 12\n")
    python.chmod(0o755)
    with pytest.raises(installer.SetupError, match=r"not a working environment of Python 3\.11; delete it"):
        installer.check(tmp_path)


def test_line_ends_do_not_change_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "requirements.in").write_bytes(b"torch==0.1\n")
    (tmp_path / "a.lock").write_bytes(b"x==1\ny==2\n")
    (tmp_path / "b.lock").write_bytes(b"x==1\r\ny==2\r\n")
    assert installer.digest(tmp_path, "a.lock") == installer.digest(tmp_path, "b.lock")


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_setup_without_python_says_what_to_do(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    dirname = shutil.which("dirname")
    assert dirname
    (tools / "dirname").symlink_to(dirname)
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")  # another version than 3.11
    (tools / "python3").chmod(0o755)
    shutil.copy(ROOT / "setup.sh", tmp_path)
    done = subprocess.run(
        ["/bin/sh", str(tmp_path / "setup.sh")], env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Python 3.11 was not found" in done.stderr
    assert "PYTHON=" in done.stderr


@pytest.mark.parametrize("name", ["setup.sh", "test.sh", "test_train.sh", ".ci/run", ".ci/lock"])
def test_scripts_can_be_run(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    assert subprocess.run(["/bin/sh", "-n", str(path)], check=False).returncode == 0


def test_the_windows_script_has_windows_line_ends() -> None:
    content = (ROOT / "setup.bat").read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 10


@pytest.mark.parametrize("name", [*LOCKS, "requirements.txt", "requirements.in", "requirements-dev.in"])
def test_no_requirements_file_names_a_host_or_a_path(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.findall(r"://|^-|^\.{0,2}/| @ |index-url|find-links", text, re.MULTILINE)


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_hashes_and_torch_is_not_among_them(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert not [line for line in lines if "--hash=sha256:" not in line]
    assert not [project for project in pins(name) if re.match(r"torch$|triton|nvidia-|cuda-", project)]


def test_the_locks_hold_what_was_asked_for() -> None:
    asked, base = pins("requirements.in"), pins("requirements.lock")
    assert {name: base.get(name) for name in asked if name != "torch"} == {
        k: v for k, v in asked.items() if k != "torch"
    }
    image = pins("requirements.txt")
    assert asked.items() <= image.items()
    extra = pins("requirements-dev.lock")
    assert pins("requirements-dev.in").items() <= extra.items()
    assert {name: extra[name] for name in extra.keys() & base.keys()} == {
        k: base[k] for k in extra.keys() & base.keys()
    }


def test_every_package_that_is_imported_is_asked_for() -> None:
    """What merely comes along with another package may go with its next version."""
    ours = {"trainer", "preprocess", "testbed", "bench", "tests", "train", "predict"}
    ours |= {path.stem for path in (ROOT / "tests").rglob("*.py")}
    known = metadata.packages_distributions()
    asked = pins("requirements.in") | pins("requirements-dev.in")
    missing: set[str] = set()
    for folder in ("trainer", "preprocess", "testbed", "bench", "tests", "."):
        for path in (ROOT / folder).glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                tops = {name.partition(".")[0] for name in names} - ours - set(sys.stdlib_module_names)
                for top in tops:
                    owners = {re.sub(r"[-_.]+", "-", owner).lower() for owner in known.get(top, [top])}
                    if not owners & asked.keys():
                        missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert not missing
