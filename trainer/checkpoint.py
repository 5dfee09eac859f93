"""Checkpoints: all that a resumed run needs, written beside and renamed, as safetensors and JSON.

    step_000500/adapter.safetensors        an adapter's tensors, one file for each component
                optim_adapter.safetensors  the tensors of its optimizer's state
                optim_adapter.json         the rest of that state; {"tensor": key} points into the file above
                hook_ema.safetensors       what a hook keeps, one file for each that keeps something
                state.json                 step, digest of the args

Nothing is pickled. Floats survive JSON exactly, because Python writes the shortest text that reads back the same.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from trainer.rundir import RunDir
from trainer.types import Adapter, Keeps

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or cannot be used. One sentence that says which and why."""


def save(
    path: Path,
    step: int,
    adapters: Sequence[Adapter],
    optimizers: Mapping[str, Optimizer],
    digest: str = "",
    hooks: Sequence[Keeps] = (),
) -> Path:
    """Write the checkpoint folder `path` whole, or leave everything as it was.

    Args:
        path: RunDir.checkpoint(step); its parent is made when missing.
        digest: of the args that a resumed run must share, see `load`.

    Raises:
        CheckpointError: the disk is full or refuses; no trace of this checkpoint is left, older ones are untouched.
    """
    files = _files(step, adapters, optimizers, digest)
    for hook in hooks:
        if state := hook.state_dict():
            files[_hook_file(hook)] = _tensor_bytes(state)
    temporary = path.parent / f".writing-{path.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
        temporary.mkdir(parents=True)
        for name, data in files.items():
            _write(temporary / name, data)
        _sync_folder(temporary)
        _put_in_place(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(len(data) for data in files.values()) / 2**20
        raise CheckpointError(
            f"the checkpoint of step {step} ({size:.1f} MiB) could not be written to {path}: "
            f"{error.strerror or error}. Earlier checkpoints are untouched; make room and continue with --resume."
        ) from error
    return path


def load(
    path: Path,
    adapters: Sequence[Adapter],
    optimizers: Mapping[str, Optimizer],
    digest: str | None = None,
    hooks: Sequence[Keeps] = (),
) -> int:
    """Put a checkpoint back into attached adapters and freshly built optimizers; the updates it stands for.

    A hook that it holds nothing of is left alone: it kept nothing, or is new to the run.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another run (`digest` or parameters differ).
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}")
        if digest is not None and state["digest"] != digest:
            raise CheckpointError(f"{path} was written by a run with other args (digest {state['digest']!r})")
        for adapter in adapters:
            adapter.load_state_dict(safetensors.torch.load((path / f"{adapter.component}.safetensors").read_bytes()))
        for component, optimizer in optimizers.items():
            _load_optimizer(path, component, optimizer)
        for hook in hooks:
            if (path / _hook_file(hook)).exists():
                hook.load_state_dict(safetensors.torch.load((path / _hook_file(hook)).read_bytes()))
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error
    return int(state["step"])


def prune(run_dir: RunDir, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for _, path in run_dir.complete_checkpoints()[:-keep]:
        shutil.rmtree(path)


def _files(
    step: int, adapters: Sequence[Adapter], optimizers: Mapping[str, Optimizer], digest: str
) -> dict[str, bytes]:
    """File name -> content of the whole checkpoint."""
    components = [adapter.component for adapter in adapters]
    if len(set(components)) < len(components):
        raise ValueError(f"two adapters would share one checkpoint file: components {components}")
    files: dict[str, bytes] = {}
    for adapter in adapters:
        files[f"{adapter.component}.safetensors"] = _tensor_bytes(adapter.state_dict())
    for component, optimizer in optimizers.items():
        tensors: dict[str, Tensor] = {}
        files[f"optim_{component}.json"] = _json_bytes(flatten(optimizer.state_dict(), tensors))
        files[f"optim_{component}.safetensors"] = _tensor_bytes(tensors)
    files["state.json"] = _json_bytes({"format": FORMAT, "step": step, "digest": digest})
    return files


def _hook_file(hook: Keeps) -> str:
    return f"hook_{hook.name}.safetensors"


def _load_optimizer(path: Path, component: str, optimizer: Optimizer) -> None:
    tensors = safetensors.torch.load((path / f"optim_{component}.safetensors").read_bytes())
    saved = unflatten(json.loads((path / f"optim_{component}.json").read_text(encoding="utf-8")), tensors)
    names = [group.get("param_names") for group in saved["param_groups"]]
    if names != [group.get("param_names") for group in optimizer.param_groups]:
        raise CheckpointError(f"{path} holds the optimizer of other parameters than this run's {component}")
    optimizer.load_state_dict(saved)
    _as_saved(optimizer, saved["state"])


def _as_saved(optimizer: Optimizer, saved: Mapping[int, Mapping[str, Any]]) -> None:
    """Gives tensors of the state the precision that they had: torch turns them to that of their parameter, and what
    an optimizer rounds after each step it would then round no more."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in saved.items():
        state = optimizer.state[parameters[int(number)]]
        for name, value in values.items():
            if isinstance(value, Tensor) and state[name].dtype != value.dtype:
                state[name] = value.to(state[name].device)


def flatten(value: Any, tensors: dict[str, Tensor], at: str = "") -> Any:
    """`value` as plain JSON, its tensors moved to `tensors` under the path they were found at."""
    if isinstance(value, Tensor):
        tensors[at] = value
        return {"tensor": at}
    if isinstance(value, Mapping):  # as pairs: JSON keys are strings only, and torch counts parameters by int
        return {"pairs": [[key, flatten(item, tensors, f"{at}/{key}")] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [flatten(item, tensors, f"{at}/{i}") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [flatten(item, tensors, f"{at}/{i}") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"optimizer state at {at!r} is a {type(value).__name__}, which a checkpoint cannot name")


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `flatten` was given."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(unflatten(item, tensors) for item in value["tuple"])
    return {key: unflatten(item, tensors) for key, item in value["pairs"]}


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut (Windows has no such call)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename the folder to its name; a folder that has the name already is taken away first."""
    old = path.parent / f".old-{path.name}"
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)
