"""Updates from a file in the kohya or the diffusers layout, all of it understood or refused. No pickle is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.args import TrainArgs
from trainer.rundir import RunDir, RunDirError
from trainer.types import ModelFamily
from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, Update

ENDS = (
    "lora_down.weight",
    "lora_up.weight",
    "lora_A.weight",
    "lora_B.weight",
    "lora_magnitude_vector",
    "alpha",
    "dora_scale",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "diff",
    "diff_b",
)
PLAIN = ("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "alpha")


class LayoutError(ValueError):
    """A file of updates that cannot be written, read or used here. One sentence."""


def file_of(given: str | Path) -> Path:
    """The .safetensors file that a path means: itself, or what the run directory there exported.

    Raises:
        LayoutError: there is none.
    """
    path = Path(given)
    if path.is_dir():
        try:
            run = RunDir.open(path)
            name = TrainArgs.model_validate_json(run.args.read_text(encoding="utf-8")).runtime.name
        except (RunDirError, ValueError, OSError) as error:
            raise LayoutError(f"{path} is a folder, but no run directory of this version: {error}") from error
        path = run.export / f"{name}.safetensors"
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        raise LayoutError(f"{path} is no .safetensors file that exists; give one, or a run directory that exported")
    return path


def is_plain_lora(keys: Iterable[str]) -> bool:
    """Whether a file holds LoRAs and nothing else, in a layout that diffusers reads."""
    keys = list(keys)
    if not all(key.endswith(tuple(f".{end}" for end in PLAIN)) for key in keys):
        return False
    text = [key for key in keys if key.startswith("lora_te")]
    return not text or any("_out_proj." in key for key in text)  # diffusers takes it for something else without


def read(path: Path, family: ModelFamily) -> dict[tuple[str, str], Update]:
    """(component, module path) -> update, in float32.

    Raises:
        LayoutError: the file is damaged, or holds what is not understood, or what this family has no layer for.
    """
    tensors, metadata = _opened(path)
    if not tensors:
        raise LayoutError(f"{path} holds nothing")
    groups: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        end = next((end for end in ENDS if key.endswith(f".{end}")), None)
        if end is None:
            strange.append(key)
        else:
            groups.setdefault(key.removesuffix(f".{end}"), {})[end] = tensor.float()
    if strange:
        raise LayoutError(f"{path} holds {len(strange)} tensors that are not understood: {', '.join(strange[:5])}")
    places = _places(family)
    homeless = sorted(groups.keys() - places.keys())
    if homeless:
        raise LayoutError(
            f"{path} changes {len(homeless)} layers that the base has not ({', '.join(homeless[:3])}); is it for "
            "another kind of base?"
        )
    alphas = _Alphas(metadata)
    return {places[name]: _update(path, name, ends, alphas.of(name, ends)) for name, ends in groups.items()}


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LayoutError(f"{path} is damaged or no .safetensors file: {error}") from error


def _places(family: ModelFamily) -> dict[str, tuple[str, str]]:
    """Every name that a layer may have in a file -> (component, module path)."""
    places: dict[str, tuple[str, str]] = {}
    for component, root in {"denoiser": family.denoiser, **family.text_encoders}.items():
        for path, module in root.named_modules():
            own = path.removesuffix(".base_layer")  # where an adapter's layer stands in the place of the base's
            if own and "weight" in dict(module.named_parameters(recurse=False)):
                places[family.clients.kohya(component, own)] = component, own
                places[family.clients.diffusers(component, own)] = component, own
    return places


class _Alphas:
    """Alpha of a LoRA's module: its own tensor, else what diffusers' metadata says, else the rank (scale 1)."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._config: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))

    def of(self, name: str, ends: Mapping[str, Tensor]) -> float | None:
        """None: there is nothing that says it."""
        if "alpha" in ends:
            return float(ends["alpha"])
        prefix, _, path = name.partition(".")
        path = path.removeprefix("text_model.")
        patterns: dict[str, float] = self._config.get(f"{prefix}.alpha_pattern", {})
        for pattern, alpha in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return float(alpha)
        alpha = self._config.get(f"{prefix}.lora_alpha")
        return None if alpha is None else float(alpha)


def _update(file: Path, name: str, ends: Mapping[str, Tensor], alpha: float | None) -> Update:
    have = ends.keys() - {"alpha"}
    down, up = (
        ("lora_down.weight", "lora_up.weight") if "lora_down.weight" in ends else ("lora_A.weight", "lora_B.weight")
    )
    if have - {"dora_scale", "lora_magnitude_vector"} == {down, up}:
        magnitude = _magnitude(file, name, ends)
        return LoraTensors(ends[down], ends[up], ends[down].shape[0] if alpha is None else alpha, magnitude)
    if have == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        factors = {key.removeprefix("hada_"): ends[key] for key in have}
        return LohaTensors(**factors, alpha=ends["hada_w1_b"].shape[0] if alpha is None else alpha)
    if "diff" in have and have <= {"diff", "diff_b"}:
        return Difference(ends["diff"], ends.get("diff_b"))
    w1, w2 = _factors(ends, "lokr_w1"), _factors(ends, "lokr_w2")
    if w1 and w2 and len(w1) + len(w2) == len(have):
        ranks = [factors[1].shape[0] for factors in (w2, w1) if len(factors) == 2]
        return LokrTensors(w1, w2, 1.0 if alpha is None or not ranks else alpha / ranks[0])
    raise LayoutError(f"{file} has for {name} {', '.join(sorted(have))}, which is no update that is understood")


def _factors(ends: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """The matrix whole, or as its two factors; empty if it is neither."""
    if name in ends:
        return (ends[name],)
    pair = (f"{name}_a", f"{name}_b")
    return tuple(ends[key] for key in pair) if all(key in ends for key in pair) else ()


def _magnitude(file: Path, name: str, ends: Mapping[str, Tensor]) -> Tensor | None:
    """Lengths of columns as clients spell them, or of rows as PEFT does."""
    if "lora_magnitude_vector" in ends:
        down = ends.get("lora_down.weight", ends.get("lora_A.weight"))
        assert down is not None
        return ends["lora_magnitude_vector"].reshape(-1, *[1] * (down.ndim - 1))
    scale = ends.get("dora_scale")
    if scale is not None and (scale.ndim < 2 or scale.shape[0] != 1):
        raise LayoutError(
            f"{file} has for {name} a dora_scale of {list(scale.shape)}, over the output axis, which programs read in "
            "different ways; only [1, inputs] means one thing"
        )
    return scale
