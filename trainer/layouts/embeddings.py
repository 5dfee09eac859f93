"""Learned token vectors from files of many programs (docs/imports.md). No pickle is run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from trainer.layouts import unpickled
from trainer.layouts.container import LayoutError, Opened
from trainer.types import Modular

PICKLES = (".pt", ".bin")  # of A1111 and of diffusers; read by `unpickled`
ENDINGS = (".safetensors", ".pti", *PICKLES)
COG = {"text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2"}  # of cog-sdxl's embeddings.pti
COG_WORDS = "special_params.json"  # beside it: trigger -> "<s0><s1>"
SAID = ("name", "string_to_token", "step", "sd_checkpoint", "sd_checkpoint_name", "notes")  # of A1111, no vectors


def is_embedding(path: Path) -> bool:
    """Whether a file holds token vectors: told by its tensors' names, or by its ending where it is a pickle."""
    if path.suffix.lower() in (".pti", *PICKLES):
        return True
    names = list(Opened(path))
    return 0 < len(names) <= 3 and all("." not in name for name in names)


def triggers_of(path: Path) -> dict[str, slice]:
    """Trigger -> its rows, where a file beside the vectors says that (cog-sdxl); else nothing."""
    words = path.parent / COG_WORDS
    if path.suffix.lower() != ".pti" or not words.is_file():
        return {}
    try:
        said: Any = json.loads(words.read_text(encoding="utf-8"))
        found = {str(word): [int(n) for n in re.findall(r"<s(\d+)>", tokens)] for word, tokens in said.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise LayoutError(f"{words} is no object of triggers and their tokens: {error}") from error
    for word, rows in found.items():
        if not rows or rows != list(range(rows[0], rows[0] + len(rows))):
            raise LayoutError(f"{words} says that {word!r} is {said[word]!r}, which are no tokens in a row")
    return {word: slice(rows[0], rows[-1] + 1) for word, rows in found.items()}


def read_embedding(path: Path, family: Modular, trigger: str | None = None) -> dict[str, Tensor]:
    """Text encoder -> vectors [n, D] in float32, of a file of A1111, ComfyUI, diffusers, OneTrainer or cog-sdxl.

    Args:
        trigger: of a file with several, whose vectors; without it all of them.

    Raises:
        LayoutError: the file is damaged, holds anything else, or is for other text encoders.
    """
    tensors = vectors(path)
    encoders = {name: encoder for encoder, name in family.clients.embeddings.items()}
    own = {**encoders, **{name: encoder for name, encoder in COG.items() if encoder in family.text_encoders}}
    if len(tensors) == 1 and len(encoders) == 1 and not tensors.keys() & {"clip_l", "clip_g", "emb_params", *COG}:
        tensors = {next(iter(encoders)): next(iter(tensors.values()))}  # diffusers names it as the token
    found = {own[name]: tensor for name, tensor in tensors.items() if name in own}
    if len(found) < len(tensors) or found.keys() != set(encoders.values()):
        held, taken = ", ".join(sorted(tensors)), ", ".join(sorted(encoders))
        raise LayoutError(f"{path} holds {held}; this base takes {taken}")
    rows = triggers_of(path).get(trigger or "", slice(None))
    return {encoder: _rows(path, tensor, encoder, family)[rows] for encoder, tensor in found.items()}


def _rows(path: Path, tensor: Tensor, encoder: str, family: Modular) -> Tensor:
    found = tensor.float().reshape(-1, tensor.shape[-1]) if tensor.ndim in (1, 2) else None
    text: Any = family.text_encoders[encoder]
    width = int(text.get_input_embeddings().weight.shape[1])
    if found is None or found.shape[1] != width or not len(found):
        raise LayoutError(f"{path} holds vectors of {list(tensor.shape)}, and the base's {encoder} takes [n, {width}]")
    if not bool(found.isfinite().all()):
        raise LayoutError(f"{path} holds numbers that are NaN or infinite")
    return found


def vectors(path: Path) -> dict[str, Tensor]:
    """The tensors by their names, as the file has them."""
    if path.suffix.lower() not in PICKLES:
        file = Opened(path)
        return {key: file.tensor(key) for key in file}
    found = unpickled.read(path)
    if not isinstance(found, dict):
        raise LayoutError(f"{path} holds no dictionary of vectors")
    held = cast(dict[Any, Any], found)
    inner: Any = held.get("string_to_param")
    if isinstance(inner, dict):  # of A1111, with the vectors under "*"
        held = {**cast(Mapping[Any, Any], inner), **{k: v for k, v in held.items() if k != "string_to_param"}}
        held = {key: value for key, value in held.items() if key not in SAID}
    strange = [str(key) for key, value in held.items() if not isinstance(value, Tensor)]
    if strange or not held:
        raise LayoutError(f"{path} holds {len(strange)} things that are no vectors: {', '.join(strange[:5])}")
    return {str(key): cast(Tensor, value) for key, value in held.items()}
