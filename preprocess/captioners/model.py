"""Where a captioner's model lies, what it is keyed by, and how it is given back."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from preprocess.types import PreprocessError
from trainer.args import CaptionModelArgs

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Place:
    """A folder, or a hub id at one revision."""

    base: str
    revision: str | None  # None for a folder

    @property
    def folder(self) -> Path | None:
        return Path(self.base) if self.revision is None else None

    def fingerprint(self) -> str:
        """Changes when the model does."""
        return f"{self.base}@{self.revision}" if self.folder is None else fingerprint(self.folder)


def find(options: CaptionModelArgs, base: str, revision: str | None, model_type: str) -> Place:
    """The model that the options name, or else the captioner's own `base` at `revision`.

    Raises:
        PreprocessError: there is no such model, it is of another type, or a hub id has no revision.
    """
    if options.base is None and options.revision is not None:
        revision = options.revision
    elif options.base is not None:
        base, revision = options.base, options.revision
    if Path(base).is_dir():
        if options.revision is not None:
            raise PreprocessError(
                f"data.caption_model.revision is {options.revision!r}, but {base!r} is a folder, which has no "
                "revisions; leave it out"
            )
        _check_type(Path(base), model_type)
        return Place(base, None)
    if not _HUB_ID.fullmatch(base):
        raise PreprocessError(f"data.caption_model.base {base!r} is neither a folder nor a hub id (owner/name)")
    if revision is None:
        raise PreprocessError(
            f"data.caption_model.base {base!r} is no folder here, and a hub id needs data.caption_model.revision: "
            "the commit to take, so that captions can be repeated"
        )
    return Place(base, revision)


def _check_type(folder: Path, expected: str) -> None:
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PreprocessError(f"data.caption_model.base {str(folder)!r} has no config.json that can be read") from error
    found = cast(dict[str, Any], config).get("model_type") if isinstance(config, dict) else None
    if found != expected:
        raise PreprocessError(
            f"data.caption_model.base {str(folder)!r} is a model of type {found!r}, and this captioner needs "
            f"{expected!r}"
        )


def fingerprint(folder: Path) -> str:
    """sha256 over the names and contents of a model's files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".txt", ".model"):
            with path.open("rb") as file:
                total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


@contextmanager
def on_device(model: Any, device: str) -> Generator[Any]:
    """The model on `device`, for reading only; its memory is given back afterwards.

    Raises:
        PreprocessError: this machine has no such device.
    """
    import torch

    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if have[name])
    if not have[device]:
        raise PreprocessError(
            f"data.caption_model.device is {device}, which this machine does not have; use auto or cpu"
        )
    model.eval().requires_grad_(False).to(device)
    try:
        with torch.inference_mode():
            yield model
    finally:
        model.to("meta")  # whoever still names the model holds no memory with it
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
