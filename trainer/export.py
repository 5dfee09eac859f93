"""Trained tensors to the files that clients load: kohya, diffusers, embeddings, and a note for who gets them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

import torch
from safetensors.torch import save
from torch import Tensor

from trainer.args import AdapterArgs, TrainArgs
from trainer.layouts import LayoutError, Modules, diffusers_lacks, diffusers_metadata, diffusers_state, kohya_state
from trainer.rundir import atomic_write
from trainer.types import Adapter, ClientNames, HasRows, HasUpdates, ModelFamily
from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, Update

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # as modelspec spells them; it has no word for others
DIFFUSERS = "pytorch_lora_weights.safetensors"


class ExportError(RuntimeError):
    """Something trained that a file cannot hold. The message lists it."""


def export(folder: Path, name: str, family: ModelFamily, adapters: Sequence[Adapter], args: TrainArgs) -> list[Path]:
    """Writes all that was trained into `folder`, in the base's dtype, each file whole or not at all.

    Returns:
        The files: `<name>.safetensors` (kohya), `pytorch_lora_weights.safetensors` (diffusers),
        `<name>_embedding.safetensors` (with several triggers `<name>_<trigger>_embedding.safetensors` for each),
        README.md; those that apply.

    Raises:
        ExportError: a tensor has no name in these layouts, or is not finite. Nothing is written then.
    """
    dtype, clients = DTYPES[args.model.dtype], family.clients
    facts = _facts(name, family, args)
    files: dict[str, bytes] = {}
    updating = [adapter for adapter in adapters if isinstance(adapter, HasUpdates)]
    if updating:
        files |= _update_files(name, updating, clients, facts, dtype)
    for adapter in adapters:
        if isinstance(adapter, HasRows):
            kind = {"modelspec.architecture": f"{clients.architecture}/textual-inversion"}
            for trigger, word in embedding_names(name, adapter.triggers).items():
                own = {**_modelspec(facts), **kind, "modelspec.trigger_phrase": trigger}
                files[f"{word}.safetensors"] = _pack(embedding_state(adapter.rows(trigger), clients), own, dtype)
        elif not isinstance(adapter, HasUpdates) and adapter.state_dict():
            raise ExportError(f"no layout is known for: {', '.join(sorted(adapter.state_dict()))}")
    files["README.md"] = _note(name, args, set(files), adapters, clients).encode()
    for file, data in files.items():
        atomic_write(folder / file, data)
    return [folder / file for file in files]


def _update_files(
    name: str, updating: Sequence[HasUpdates], clients: ClientNames, facts: Mapping[str, str], dtype: torch.dtype
) -> dict[str, bytes]:
    """The kohya file, and the diffusers file where diffusers knows such updates."""
    modules = {key: update for adapter in updating for key, update in adapter.modules().items()}
    files: dict[str, bytes] = {}
    try:
        if diffusers_lacks(modules) is None:
            extra = {"format": "pt", "lora_adapter_metadata": diffusers_metadata(modules, clients)}
            files[DIFFUSERS] = _pack(diffusers_state(modules, clients), extra, dtype)
        if any(_of_rows(update) for update in modules.values()):  # programs do not read their lengths alike
            modules = {key: update for adapter in updating for key, update in adapter.differences().items()}
        kohya = _pack(kohya_state(modules, clients), {**facts, **_update_facts(modules)}, dtype)
    except LayoutError as error:
        raise ExportError(str(error)) from error
    return {f"{name}.safetensors": kohya, **files}


def _of_rows(update: Update) -> bool:
    return isinstance(update, LoraTensors) and update.magnitude is not None and update.magnitude.shape[0] != 1


def embedding_state(rows: Mapping[str, Tensor], clients: ClientNames) -> dict[str, Tensor]:
    """[n, D] vectors under the key that clients expect for each text encoder."""
    unknown = sorted(rows.keys() - clients.embeddings.keys())
    if unknown:
        raise ExportError(f"no client reads vectors of: {', '.join(unknown)}")
    return {clients.embeddings[encoder]: vectors for encoder, vectors in rows.items()}


def embedding_name(name: str) -> str:
    """The word that stands for the file in a prompt: clients take the file's name, and stop at signs."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name) + "_embedding"


def embedding_names(name: str, triggers: Sequence[str]) -> dict[str, str]:
    """Trigger -> the word that stands for its file in a prompt. Files differ where case does not count, too."""
    if len(triggers) == 1:
        return {triggers[0]: embedding_name(name)}
    names: dict[str, str] = {}
    for trigger in triggers:
        stem = f"{name}_{trigger.strip('<>')}"
        word, n = embedding_name(stem), 2
        while word.lower() in (taken.lower() for taken in names.values()):
            word, n = embedding_name(f"{stem}-{n}"), n + 1
        names[trigger] = word
    return names


def _pack(state: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype) -> bytes:
    """A safetensors file; alphas (0-d) stay float32."""
    tensors = {key: (t.float() if t.ndim == 0 else t.to(dtype)).cpu().contiguous() for key, t in state.items()}
    bad = sorted(key for key, tensor in tensors.items() if not bool(tensor.isfinite().all()))
    if bad:
        raise ExportError(f"{len(bad)} tensors are not finite, so nothing was exported: {', '.join(bad[:3])}")
    return save(tensors, dict(metadata))


def _facts(name: str, family: ModelFamily, args: TrainArgs) -> dict[str, str]:
    """What file managers show. No path, user or time goes in."""
    resolution = max(args.data.resolution, default=family.resolution)
    return {
        "ss_base_model_version": family.clients.base_version,
        **family.clients.facts,
        "ss_output_name": name,
        "ss_sd_model_name": _base_name(args),
        "ss_resolution": f"({resolution}, {resolution})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.clients.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        **({"modelspec.prediction_type": spelled} if (spelled := PREDICTIONS.get(family.path.target)) else {}),
        "modelspec.trigger_phrase": ", ".join(args.data.triggers),
    }


def _update_facts(modules: Modules) -> dict[str, str]:
    """What kohya's file says of its network; Dynamic where modules differ."""
    network = next(iter({_network(update): None for update in modules.values()}))
    ranks = {_rank_and_alpha(update) for update in modules.values()}
    rank, alpha = ranks.pop() if len(ranks) == 1 else ("Dynamic", "Dynamic")
    facts = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": network})}
    if network == "lora":
        facts = {"ss_network_module": "networks.lora"}
    return {**facts, "ss_network_dim": rank, "ss_network_alpha": alpha} if rank else facts


def _network(update: Update) -> str:
    names = {LoraTensors: "lora", LohaTensors: "loha", LokrTensors: "lokr", Difference: "full"}
    return names[type(update)]


def _rank_and_alpha(update: Update) -> tuple[str, str]:
    """As text; empty where the kind has none."""
    if isinstance(update, LoraTensors):
        return str(update.down.shape[0]), f"{update.alpha:g}"
    if isinstance(update, LohaTensors):
        return str(update.w1_b.shape[0]), f"{update.alpha:g}"
    return "", ""


def _modelspec(facts: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in facts.items() if key.startswith("modelspec.")}


def _base_name(args: TrainArgs) -> str:
    """The last part of the base's path or hub id."""
    return PurePath(args.model.base.replace("\\", "/")).name or args.model.base


def _note(name: str, args: TrainArgs, files: set[str], adapters: Sequence[Adapter], clients: ClientNames) -> str:
    """README.md for the person who gets the files."""
    words: dict[str, str] = {}
    for adapter in adapters:
        if isinstance(adapter, HasRows):
            words = embedding_names(name, adapter.triggers)
    triggers = list(words) or list(args.data.triggers)
    made_for = ", ".join(f"*{_example(args, trigger)}*" for trigger in triggers)
    lines = [f"# {name}", "", f"Made for prompts like: {made_for}", "", f"- base model: {_base_name(args)}"]
    lines += [f"- trigger: `{trigger}`{_of_folders(args, trigger)}" for trigger in triggers]
    for adapter in adapters:
        if isinstance(adapter, HasUpdates):
            lines.append(_described(adapter.modules(), args.adapter))
        elif isinstance(adapter, HasRows):
            count = max(len(vectors) for vectors in adapter.rows(adapter.triggers[0]).values())
            lines.append(f"- {count} token vectors that stand for {'the' if len(triggers) == 1 else 'each'} trigger")
    if args.model.merge:
        lines.append(f"- merged into the base first: {', '.join(_merged(args))}")
    lines += ["", *_ui_lines(name, triggers, f"{name}.safetensors" in files, words), ""]
    lines += ["## diffusers", "", *_diffusers_section(name, triggers, files, words, adapters, clients), ""]
    return "\n".join(lines)


def _described(modules: Modules, adapter: AdapterArgs) -> str:
    """A line about what was trained, and where."""
    text = all(component != "denoiser" for component, _ in modules)
    own = adapter.for_text() if text else adapter
    where = f"layers that match {' or '.join(own.match)}" if own.match else own.targets.replace("+", ", ")
    names = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "full": "Full differences"}
    what = names.get(adapter.kind, adapter.kind)
    found = sorted({_rank_and_alpha(update) for update in modules.values()})
    if len(found) == 1 and found[0][0]:
        what += f" of rank {found[0][0]}, alpha {found[0][1]}"
    elif len(found) > 1:
        what += f" of (rank, alpha) {', '.join(f'({rank}, {alpha})' for rank, alpha in found)}"
    return f"- {what}, on {where}{' of the text encoders' if text else ''}"


def _merged(args: TrainArgs) -> list[str]:
    names = {file: PurePath(file.replace("\\", "/")).name for file in args.model.merge}
    return [f"`{names[file]}` at {strength:g}" for file, strength in args.model.merge.items()]


def _diffusers_section(
    name: str,
    triggers: Sequence[str],
    files: set[str],
    words: Mapping[str, str],
    adapters: Sequence[Adapter],
    clients: ClientNames,
) -> list[str]:
    """Code that loads what diffusers can load, and why it cannot load the rest."""
    lines: list[str] = []
    modules = {
        key: up for adapter in adapters if isinstance(adapter, HasUpdates) for key, up in adapter.modules().items()
    }
    lacks = diffusers_lacks(modules)
    if lacks:
        lines += [
            f"There is no file for `load_lora_weights`: {lacks}. `predict.py` draws with `{name}.safetensors`.",
            "",
        ]
    elif any(component != "denoiser" and _of_rows(update) for (component, _), update in modules.items()):
        lines += ["diffusers leaves out the lengths of the text encoders' DoRA, so its pictures differ from ours.", ""]
    if DIFFUSERS in files or words:
        lines += ["```python", *_diffusers_lines(triggers, DIFFUSERS in files, words, clients), "```"]
    return lines


def _example(args: TrainArgs, trigger: str) -> str:
    """What a picture of the trigger is captioned with that came without a caption."""
    own = [args.data.of(folder) for folder, concept in args.data.concepts.items() if concept.trigger == trigger]
    return (own[0] if own else args.data).own_caption


def _of_folders(args: TrainArgs, trigger: str) -> str:
    folders = [folder for folder, concept in args.data.concepts.items() if concept.trigger == trigger]
    return f" (folder {', '.join(folders)})" if folders else ""


def _ui_lines(name: str, triggers: Sequence[str], lora: bool, words: Mapping[str, str]) -> list[str]:
    files = " and ".join(f"`{word}.safetensors`" for word in words.values())
    lines = ["## ComfyUI", ""]
    if lora:
        lines.append(f"Put `{name}.safetensors` into `models/loras` and load it with *Load LoRA*.")
    if words:
        lines.append(f"Put {files} into `models/embeddings`.")
    lines += [_where({t: f"embedding:{words[t]}" if t in words else t for t in triggers}), ""]
    lines += ["## AUTOMATIC1111, Forge", ""]
    if lora:
        lines.append(f"Put `{name}.safetensors` into `models/Lora` and write `<lora:{name}:1>` in the prompt.")
    if words:
        lines.append(f"Put {files} into `embeddings`.")
    return [*lines, _where({t: words.get(t, t) for t in triggers})]


def _where(said: Mapping[str, str]) -> str:
    """What to write in a prompt; `said` is by trigger."""
    if len(said) == 1:
        return f"In the prompt write `{next(iter(said.values()))}` where the concept stands."
    return "In the prompt write " + ", ".join(f"`{word}` for `{trigger}`" for trigger, word in said.items()) + "."


def _diffusers_lines(triggers: Sequence[str], lora: bool, words: Mapping[str, str], clients: ClientNames) -> list[str]:
    lines: list[str] = []
    if lora:
        lines.append('pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")')
    tokens = diffusers_tokens(triggers)
    for trigger, word in words.items():
        lines += _loading_lines(word, json.dumps(tokens[trigger]), clients)
    said = [tokens[trigger] if trigger in words else trigger for trigger in triggers]
    return [*lines, f"picture = pipe({json.dumps(f'a photo of {said[0]}')}).images[0]"] + [
        f"picture = pipe({json.dumps(f'a photo of {word}')}).images[0]" for word in said[1:]
    ]


def _loading_lines(word: str, token: str, clients: ClientNames) -> list[str]:
    """Of one embedding. Of several text encoders diffusers is told which vectors are whose."""
    if len(clients.embeddings) == 1:
        return [f'pipe.load_textual_inversion("{word}.safetensors", token={token})']
    lines = ["from safetensors.torch import load_file", f'vectors = load_file("{word}.safetensors")']
    for encoder, key in clients.embeddings.items():
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        place = f"text_encoder=pipe.{encoder}, tokenizer=pipe.{tokenizer}"
        lines.append(f'pipe.load_textual_inversion(vectors["{key}"], token={token}, {place})')
    return lines


def diffusers_tokens(triggers: Sequence[str]) -> dict[str, str]:
    """Trigger -> `diffusers_token` of it, numbered where two would be one."""
    tokens: dict[str, str] = {}
    for trigger in triggers:
        token, n = diffusers_token(trigger), 2
        while token in tokens.values():
            token, n = diffusers_token(f"{trigger.strip('<>')}-{n}"), n + 1
        tokens[trigger] = token
    return tokens


def diffusers_token(trigger: str) -> str:
    """A token under which diffusers uses all the vectors, of a prompt that spells it the same way.

    CLIP's tokenizer lowers case, and diffusers then looks for the lowered token in the prompt as written: with a
    capital in it only the first vector is used, without a message. The brackets keep it from matching inside words.
    """
    return f"<{trigger.strip('<>').lower()}>"
