"""Which files a run leaves: each layout's, all checked before the first is written, each whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.args import Layout, TrainArgs
from trainer.export import facts, note, workflow
from trainer.export.facts import Made
from trainer.export.learned import Learned
from trainer.export.names import DIFFUSERS, embedding_names
from trainer.layouts import (
    LayoutError,
    Modules,
    cannot_say,
    comfy_state,
    container,
    diffusers_metadata,
    diffusers_state,
    kohya_state,
    peft_folders,
)
from trainer.rundir import atomic_folder, atomic_write
from trainer.types import Adapter, ClientNames, HasCheckpoint, ModelFamily

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMAT = {"format": "pt"}  # without it transformers refuses a file, and PEFT's own files have it


class ExportError(RuntimeError):
    """Something trained that a file cannot hold. The message lists it."""


@dataclass(frozen=True)
class Tensors:
    """A safetensors file to be."""

    state: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Folder:
    """A folder to be: files by path in it, and what else writes into it."""

    files: Mapping[str, Tensors | str]
    settings: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class About:
    """What headers are written from."""

    name: str
    family: ModelFamily
    args: TrainArgs
    made: Made


Output = Tensors | Folder


def export(
    folder: Path,
    name: str,
    family: ModelFamily,
    adapters: Sequence[Adapter],
    args: TrainArgs,
    made: Made | None = None,
) -> list[Path]:
    """Writes all that was trained into `folder`, in the layouts of `args.export`, each file whole or not at all.

    Args:
        made: what the run knows of itself, for headers.

    Returns:
        The files and folders: `<name>.safetensors` (kohya), `pytorch_lora_weights.safetensors` (diffusers),
        `<name>_comfy.safetensors`, `<name>_peft/`, `<name>_model.safetensors` (checkpoint), `<name>_model/`
        (checkpoint-folder), `<name>_embedding.safetensors` (with several triggers
        `<name>_<trigger>_embedding.safetensors` for each), `<name>_comfyui.json` (a workflow), `<name>.png` (a sample)
        and README.md; those that apply.

    Raises:
        ExportError: a layout has no words for what was trained, or a tensor is not finite. Nothing is written then.
    """
    check(family, adapters, args)
    learned, dtype = Learned(adapters, args.export), DTYPES[args.export.dtype or args.model.dtype]
    try:
        about = About(name, family, args, made or Made())
        outputs = _of_layers(learned, about) | _of_rows(learned, about)
    except LayoutError as error:
        raise ExportError(str(error)) from error
    for output in outputs.values():
        _check_finite(output, dtype)
    texts = _texts(outputs, learned, about)
    for file, output in outputs.items():
        _write(folder / file, output, dtype)
    for file, text in texts.items():
        atomic_write(folder / file, text)
    return [folder / file for file in (*outputs, *texts)]


def _texts(outputs: Mapping[str, Output], learned: Learned, about: About) -> dict[str, str | bytes]:
    """What stands beside the files: a sample picture, under the name by which programs show it, workflow and README."""
    name, made = about.name, about.made
    texts: dict[str, str | bytes] = {}
    if made.sample is not None:
        texts[f"{name}.png"] = made.sample.read_bytes()
    words = {
        trigger: word for adapter in learned.rows for trigger, word in embedding_names(name, adapter.triggers).items()
    }
    lora = next((file for file in (f"{name}.safetensors", f"{name}_comfy.safetensors") if file in outputs), None)
    model = f"{name}_model.safetensors" if f"{name}_model.safetensors" in outputs else None
    if lora or model or words:
        prompt = note.comfy_prompt(about.args, words)
        texts[f"{name}_comfyui.json"] = workflow.workflow(
            name, prompt, about.args, about.family, lora=lora, model=model, strength=made.strength
        )
    texts["README.md"] = note.written(name, about.args, {*outputs, *texts}, learned, about.family.clients, made)
    return texts


def check(family: ModelFamily, adapters: Sequence[Adapter], args: TrainArgs) -> None:
    """Refuses, before anything is trained, layouts that have no words for what these adapters learn.

    Raises:
        ExportError: it lists what they cannot say.
    """
    learned = Learned(adapters, args.export)
    if learned.unknown:
        raise ExportError(f"no layout is known for: {', '.join(learned.unknown)}")
    modules = learned.sketch()
    for layout in args.export.for_layers() if modules else ():
        lacks = cannot_say(layout, modules, family.clients)
        if layout.startswith("checkpoint") and not isinstance(family, HasCheckpoint):
            lacks = {"the whole model of this family": [family.name]}
        if lacks:
            said = "; ".join(f"{reason} ({_few(layers)})" for reason, layers in lacks.items())
            raise ExportError(f"export.layouts has {layout}, which cannot say {said}; {_instead(lacks)}")
    for adapter in learned.rows:
        embedding_state(adapter.rows(), family.clients)


def _few(layers: Sequence[str]) -> str:
    return ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")


def _instead(lacks: Mapping[str, Sequence[str]]) -> str:
    dora = all(reason.startswith("DoRA") for reason in lacks)
    return "take kohya, which can" + (", or have the nearest LoRA written (export.dora lora)" if dora else "")


def _of_layers(learned: Learned, about: About) -> dict[str, Output]:
    if not learned.trained:
        return {}
    name, clients = about.name, about.family.clients
    made: dict[Layout, Callable[[], dict[str, Output]]] = {
        "kohya": lambda: {f"{name}.safetensors": _named(kohya_state, learned, about)},
        "comfy": lambda: {f"{name}_comfy.safetensors": _named(comfy_state, learned, about)},
        "diffusers": lambda: {DIFFUSERS: _diffusers(learned, clients)},
        "peft": lambda: {f"{name}_peft": _peft(learned, clients)},
        "checkpoint": lambda: {f"{name}_model.safetensors": _single_file(learned, about)},
        "checkpoint-folder": lambda: {f"{name}_model": _model_folder(learned, about.family)},
    }
    return {file: output for layout in about.args.export.for_layers() for file, output in made[layout]().items()}


def _named(state: Callable[[Modules, ClientNames], dict[str, Tensor]], learned: Learned, about: About) -> Tensors:
    modules = learned.readable()
    said = facts.of_layers(about.name, modules, about.family, about.args, about.made)
    return Tensors(state(modules, about.family.clients), said)


def _diffusers(learned: Learned, clients: ClientNames) -> Tensors:
    """Its metadata is part of the layout, whatever export.metadata says: alpha is nowhere else."""
    modules = learned.modules()
    said = {**FORMAT, "lora_adapter_metadata": diffusers_metadata(modules, clients)}
    return Tensors(diffusers_state(modules, clients), said)


def _peft(learned: Learned, clients: ClientNames) -> Folder:
    files: dict[str, Tensors | str] = {}
    for part, (state, config) in peft_folders(learned.modules(), clients).items():
        files[f"{part}/adapter_model.safetensors"] = Tensors(state, FORMAT)
        files[f"{part}/adapter_config.json"] = config
    return Folder(files)


def _single_file(learned: Learned, about: About) -> Tensors:
    family = about.family
    assert isinstance(family, HasCheckpoint)
    return Tensors(
        family.single_file(merged(learned, family)), facts.of_model(about.name, family, about.args, about.made)
    )


def _model_folder(learned: Learned, family: ModelFamily) -> Folder:
    assert isinstance(family, HasCheckpoint)
    files = family.folder(merged(learned, family))
    return Folder({path: Tensors(state, FORMAT) for path, state in files.items()}, family.save_settings)


def merged(learned: Learned, family: HasCheckpoint) -> dict[str, dict[str, Tensor]]:
    """The base's tensors with W' for every W that was trained (float32 where it was), as trained, not as reduced."""
    tensors = {part: dict(own) for part, own in family.tensors().items()}
    for (component, path), change in learned.differences().items():
        for end, diff in (("weight", change.weight), ("bias", change.bias)):
            if diff is not None:
                before = tensors[component][f"{path}.{end}"]
                tensors[component][f"{path}.{end}"] = before.float() + diff.to(before.device)
    return tensors


def _of_rows(learned: Learned, about: About) -> dict[str, Output]:
    files: dict[str, Output] = {}
    for adapter in learned.rows:
        for trigger, word in embedding_names(about.name, adapter.triggers).items():
            state = embedding_state(adapter.rows(trigger), about.family.clients)
            said = facts.of_rows(about.name, trigger, about.family, about.args, about.made)
            files[f"{word}.safetensors"] = Tensors(state, said)
    return files


def embedding_state(rows: Mapping[str, Tensor], clients: ClientNames) -> dict[str, Tensor]:
    """[n, D] vectors under the key that clients expect for each text encoder."""
    unknown = sorted(rows.keys() - clients.embeddings.keys())
    if unknown:
        raise ExportError(f"no client reads vectors of: {', '.join(unknown)}")
    return {clients.embeddings[encoder]: vectors for encoder, vectors in rows.items()}


def _check_finite(output: Output, dtype: torch.dtype) -> None:
    if isinstance(output, Folder):
        for file in output.files.values():
            if isinstance(file, Tensors):
                _check_finite(file, dtype)
        return
    kinds = {name: _kept(tensor, dtype) for name, tensor in output.state.items()}
    bad = sorted(name for name, kind in kinds.items() if not bool(output.state[name].to(kind).isfinite().all()))
    if bad:
        raise ExportError(
            f"{len(bad)} tensors are not finite in {str(dtype).removeprefix('torch.')}, so nothing was exported: "
            f"{', '.join(bad[:3])}"
        )


def _write(path: Path, output: Output, dtype: torch.dtype) -> None:
    if isinstance(output, Tensors):
        _store(path, output, dtype)
        return
    with atomic_folder(path) as folder:
        if output.settings is not None:
            output.settings(folder)
        for file, content in output.files.items():
            if isinstance(content, str):
                atomic_write(folder / file, content)
            else:
                _store(folder / file, content, dtype)


def _store(path: Path, output: Tensors, dtype: torch.dtype) -> None:
    """Wide tensors first, so that all are aligned; by name among themselves, as safetensors does."""
    kinds = {name: _kept(tensor, dtype) for name, tensor in output.state.items()}
    order = sorted(kinds, key=lambda name: (-kinds[name].itemsize, name))
    entries = {name: container.Entry(kinds[name], tuple(output.state[name].shape)) for name in order}
    container.write(path, entries, ((name, output.state[name].to(kinds[name])) for name in order), output.metadata)


def _kept(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is written as in a file of `dtype`: alphas (0-d) stay float32, as clients read numbers of them."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return dtype if tensor.ndim else torch.float32
