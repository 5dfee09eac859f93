"""Opens the parts of a base model, answering every wrong base with one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from trainer import lean
from trainer.types import BaseModelError

PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def is_single_file(base: str) -> bool:
    """True for a .safetensors file; every other file, and pickles above all, are refused."""
    path = Path(base)
    if path.suffix.lower() in PICKLES:
        raise BaseModelError(
            f"base {base!r} is a pickle, which could run code when it is read; convert it to .safetensors first"
        )
    if path.is_file() and path.suffix.lower() != ".safetensors":
        raise BaseModelError(f"base {base!r} is a file, but not a .safetensors checkpoint")
    if not path.exists() and path.suffix.lower() == ".safetensors":
        raise BaseModelError(f"base {base!r} does not exist")
    return path.is_file()


def single_file_keys(base: str) -> set[str]:
    """Names of the tensors in a .safetensors file, read from its header."""
    try:
        with safe_open(base, framework="pt") as opened:
            return set(opened.keys())
    except SafetensorError as error:
        raise BaseModelError(f"base {base!r} is damaged or no safetensors file: {error}") from error


def single_file_facts(base: str) -> dict[str, str]:
    """The metadata of a .safetensors file."""
    with safe_open(base, framework="pt") as opened:
        return dict(opened.metadata() or {})


def model_index(base: str, revision: str | None) -> dict[str, Any]:
    """The parsed model_index.json of a diffusers folder or of a hub id."""
    return settings_of(base, "model_index.json", revision)


def settings_of(base: str, name: str, revision: str | None) -> dict[str, Any]:
    """A parsed JSON file of a diffusers folder or of a hub id, such as unet/config.json."""
    folder = Path(base)
    if folder.is_dir():
        path = folder / name
        if not path.is_file():
            raise BaseModelError(f"base {base!r} has no {name}, so it is no diffusers model folder")
    else:
        path = _from_hub(base, name, revision)
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"the {name} of base {base!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BaseModelError(f"the {name} of base {base!r} is not an object")
    return {str(key): value for key, value in found.items()}


def _from_hub(base: str, name: str, revision: str | None) -> Path:
    if not HUB_ID.fullmatch(base):
        raise BaseModelError(f"base {base!r} does not exist (allowed: diffusers folder, .safetensors file, hub id)")
    try:
        return Path(hf_hub_download(base, name, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise BaseModelError(
            f"base {base!r} is no folder or file here, and no diffusers model{at} came from the hub under that name "
            f"({type(error).__name__}); check the spelling, the connection and the access rights"
        ) from error


def part(kind: Any, base: str, name: str, revision: str | None, dtype: torch.dtype) -> Any:
    """One network of the base, every weight of it read from safetensors."""
    try:
        with _no_bars(), lean.undrawn():
            loaded: Any = kind.from_pretrained(
                base, subfolder=name, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except LOAD_ERRORS as error:
        raise BaseModelError(f"cannot load {name} of base {base!r}: {first_line(error)}") from error
    module, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise BaseModelError(f"{name} of base {base!r} lacks {len(missing)} of its weights, {missing[0]!r} for one")
    return module


def settings(kind: Any, base: str, name: str, revision: str | None) -> Any:
    """A part without weights: a tokenizer or a scheduler."""
    try:
        return kind.from_pretrained(base, subfolder=name, revision=revision)
    except LOAD_ERRORS as error:
        raise BaseModelError(f"cannot load {name} of base {base!r}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def _no_bars() -> Generator[None]:
    """Keeps the loading bar of transformers off the terminal."""
    shown: bool = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
