"""Makes the project's virtual environment and installs the locked requirements into it, once.

setup.sh and setup.bat call this with Python 3.11; only the standard library is used. What was installed is
remembered in stamp files inside the environment, so that a run with unchanged locks installs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (3, 11)


class SetupError(Exception):
    """The environment cannot be made; the message says what to do."""


def interpreter(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def torch_pin(root: Path) -> str:
    """The line of requirements.in that names torch: it is installed first, in the build that fits the machine."""
    for line in (root / "requirements.in").read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise SetupError("requirements.in names no torch==VERSION")


def digest(root: Path, lock: str) -> str:
    content = (root / lock).read_bytes() + torch_pin(root).encode()
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


def call(command: list[str], failure: str) -> None:
    # The interpreter that runs this may have set variables that would lead pip to its own packages.
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONHOME", "PYTHONPATH")}
    if subprocess.run(command, env=env, check=False).returncode != 0:
        raise SetupError(failure)


def create(venv: Path) -> None:
    if sys.version_info[:2] != PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(f"Python 3.11 is needed to make {venv}, but this is Python {found} ({sys.executable})")
    call(
        [sys.executable, "-m", "venv", str(venv)],
        f"could not make {venv}; if ensurepip is missing, install your system's python3.11-venv package and try again",
    )


def check(venv: Path) -> None:
    """An environment that is there must be one of Python 3.11 that works."""
    code = "import sys, pip; print(sys.version_info[0], sys.version_info[1])"
    try:
        result = subprocess.run([str(interpreter(venv)), "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise SetupError(
            f"{interpreter(venv)} does not start ({error}); delete {venv} and run the setup again"
        ) from error
    if result.stdout.split() != [str(n) for n in PYTHON]:
        raise SetupError(f"{venv} is not a working environment of Python 3.11; delete it and run the setup again")


def install(venv: Path, root: Path, lock: str) -> bool:
    """Installs what `lock` holds, unless its stamp says that it is there. True if anything was installed."""
    stamp = venv / f".installed-{Path(lock).stem}"
    wanted = digest(root, lock)
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == wanted:
        return False
    stamp.unlink(missing_ok=True)
    pip = [str(interpreter(venv)), "-m", "pip", "--disable-pip-version-check"]
    again = "; nothing is lost: run the setup again when the cause is gone"
    if lock == "requirements.lock":
        print(f"setup: installing {torch_pin(root)}", flush=True)
        call([*pip, "install", "--quiet", torch_pin(root)], "installing torch failed" + again)
    print(f"setup: installing {lock}", flush=True)
    locked = ["install", "--quiet", "--require-hashes", "--no-deps", "-r", str(root / lock)]
    call([*pip, *locked], f"installing {lock} failed" + again)
    call([*pip, "check"], f"the packages of {lock} do not fit together; delete {venv} and run the setup again")
    stamp.write_text(wanted + "\n", encoding="utf-8")
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="setup", description="Makes .venv and installs the locked requirements.")
    parser.add_argument("--dev", action="store_true", help="also install what the tests need")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="environment to make [default: .venv]")
    options = parser.parse_args(argv)
    locks = ["requirements.lock"] + (["requirements-dev.lock"] if options.dev else [])
    try:
        if interpreter(options.venv).exists():
            check(options.venv)
        else:
            create(options.venv)
        done = [install(options.venv, ROOT, lock) for lock in locks]
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    print(f"setup: {options.venv.name} is ready" if any(done) else "setup: everything is installed already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
