"""A captioner's model: where it lies, what it is keyed by, on what it runs, and how it is given back."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from preprocess.types import PreprocessError
from trainer.args import CaptionModelArgs

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HASHED = (".json", ".jinja", ".safetensors", ".txt", ".model", ".onnx", ".csv")

# Options of data.caption_model that not every captioner uses, and which do.
_FOR: Mapping[str, str] = {
    "vocabulary": "clip",
    "prompt": "blip, florence2, qwen-vl and joycaption",
    "tokens": "captioners that write sentences",
    "dtype": "blip, florence2, qwen-vl and joycaption",
    "general_threshold": "wd-tagger",
    "character_threshold": "wd-tagger",
}

# Generation that gives the same words each time.
GREEDY: Mapping[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


class Named(Protocol):
    """Options that name a model."""

    @property
    def base(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...


def check_used(options: CaptionModelArgs, captioner: str, used: Collection[str]) -> None:
    """Raises PreprocessError for an option that is given and does nothing with this captioner."""
    given, untouched = options.model_dump(), CaptionModelArgs.model_validate({}).model_dump()
    for name, owners in _FOR.items():
        if name not in used and given[name] != untouched[name]:
            raise PreprocessError(f"data.caption_model.{name} is for {owners}; {captioner} does not use it")


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


def find(
    options: Named,
    base: str,
    revision: str | None,
    model_types: Collection[str] | None,
    section: str = "data.caption_model",
) -> Place:
    """The model that the options name, or else the captioner's own `base` at `revision`.

    Args:
        model_types: what config.json of a folder may say; None where a model comes without one.
        section: the options, as messages call them.

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
                f"{section}.revision is {options.revision!r}, but {base!r} is a folder, which has no "
                "revisions; leave it out"
            )
        if model_types is not None:
            _check_type(Path(base), model_types, section)
        return Place(base, None)
    if not _HUB_ID.fullmatch(base):
        raise PreprocessError(f"{section}.base {base!r} is neither a folder nor a hub id (owner/name)")
    if revision is None:
        raise PreprocessError(
            f"{section}.base {base!r} is no folder here, and a hub id needs {section}.revision: "
            "the commit to take, so that captions can be repeated"
        )
    return Place(base, revision)


def _check_type(folder: Path, expected: Collection[str], section: str) -> None:
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PreprocessError(f"{section}.base {str(folder)!r} has no config.json that can be read") from error
    found = cast(dict[str, Any], config).get("model_type") if isinstance(config, dict) else None
    if expected and found not in expected:
        raise PreprocessError(
            f"{section}.base {str(folder)!r} is a model of type {found!r}, and "
            f"{' or '.join(repr(name) for name in expected)} is needed"
        )


def fingerprint(folder: Path) -> str:
    """sha256 over the names and contents of a model's files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _HASHED:
            with path.open("rb") as file:
                total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def device_of(wanted: str, section: str = "data.caption_model") -> str:
    """cpu, cuda or mps; what auto means here.

    Raises:
        PreprocessError: this machine has no such device.
    """
    import torch

    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, there in have.items() if there)
    if not have[wanted]:
        raise PreprocessError(f"{section}.device is {wanted}, which this machine does not have; use auto or cpu")
    return wanted


@contextmanager
def on_device(model: Any, device: str) -> Generator[Any]:
    """The model on `device`, one of `device_of`, for reading only; its memory is given back afterwards."""
    import torch

    model.eval().requires_grad_(False).to(device)
    try:
        with torch.inference_mode():
            yield model
    finally:
        model.to("meta")  # whoever still names the model holds no memory with it
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def stops(network: Any) -> set[int]:
    """The tokens that end what the network writes."""
    ends = network.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])
