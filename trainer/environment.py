"""Where a run happens: versions, device, git state, the base on the disk, its digests. It becomes env.json."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trainer.rundir import atomic_write
from trainer.types import BaseModelError, ModelFamily

log = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "prodigyopt", "numpy", "pillow")
ROOT = Path(__file__).resolve().parent.parent


def describe(family: ModelFamily, device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Facts as JSON, with no path and no name of a user in them."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions(*PACKAGES),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "git": _git(),
        "base": base_digests(family),
    }


def record(path: Path, family: ModelFamily, device: torch.device, start: int, processes: int = 1) -> None:
    """env.json of the first launch; each later one joins its list, once the base has proved the same.

    Raises:
        BaseModelError: the base has other weights than when the run began.
    """
    if not path.is_file():
        atomic_write(path, json.dumps({**describe(family, device, processes), "resumed": []}, indent=2) + "\n")
        return
    check(path, family)
    now = describe(family, device, processes)
    first = _read(path)
    if first["packages"] != now["packages"]:
        log.warning("other package versions than when this run began: results can differ in their last bits")
    first["resumed"].append({**now, "step": start})
    atomic_write(path, json.dumps(first, indent=2) + "\n")


def check(path: Path, family: ModelFamily) -> None:
    """Refuses a base with other weights than env.json records.

    Raises:
        BaseModelError: as above.
    """
    first = _read(path)["base"]
    other = [part for part, value in base_digests(family).items() if first.get(part) != value]
    if other:
        raise BaseModelError(
            f"the base has changed since this run began ({', '.join(other)} differ); give it the same base"
        )


def processes(path: Path) -> int | None:
    """How many processes made the run of this env.json; None while there is no such file."""
    return _read(path).get("processes", 1) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def base_digests(family: ModelFamily) -> dict[str, str]:
    """Digest of each part of the base, by name."""
    return {part: family.fingerprint(part) for part in ("denoiser", "vae", *family.text_encoders)}


def located(base: str) -> str:
    """The absolute path of a local base, found from here or beside the project; a hub id as it is."""
    path = Path(base).expanduser()
    return next((str(there.absolute()) for there in (path, ROOT / path) if there.exists()), base)


def versions(*packages: str) -> dict[str, str | None]:
    """By package; None where it is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and whether files differ from it; None where this is no git checkout or git is missing."""
    try:
        commit = _git_says("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git_says("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git_says(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
