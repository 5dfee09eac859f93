"""README.md for the person who gets the files: what they are, and what to write in which program."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath

from trainer.args import AdapterArgs, TrainArgs
from trainer.export.facts import Made, rank_and_alpha
from trainer.export.learned import Learned
from trainer.export.names import DIFFUSERS, base_name, diffusers_tokens, embedding_names
from trainer.layouts import Modules, cannot_say
from trainer.types import ClientNames
from trainer.updates import LoraTensors

KINDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "full": "Full differences"}


def written(
    name: str, args: TrainArgs, files: Collection[str], learned: Learned, clients: ClientNames, made: Made
) -> str:
    """The text. `files` are those beside it."""
    words: dict[str, str] = {}
    for adapter in learned.rows:
        words = embedding_names(name, adapter.triggers)
    triggers = list(words) or list(args.data.triggers)
    made_for = ", ".join(f"*{_example(args, trigger)}*" for trigger in triggers)
    picture = [f"![a sample]({name}.png)", ""] if f"{name}.png" in files else []
    lines = [f"# {name}", "", *picture, f"Made for prompts like: {made_for}", "", f"- base model: {base_name(args)}"]
    lines += [f"- trigger: `{trigger}`{_of_folders(args, trigger)}" for trigger in triggers]
    lines += _described(learned, args)
    for adapter in learned.rows:
        count = max(len(vectors) for vectors in adapter.rows(adapter.triggers[0]).values())
        lines.append(f"- {count} token vectors that stand for {'the' if len(triggers) == 1 else 'each'} trigger")
    if args.model.merge:
        lines.append(f"- merged into the base first: {', '.join(_merged(args))}")
    if learned.trained:
        lines += _strength(made)
    lines += ["", *_programs(name, triggers, files, words, made.strength), ""]
    lines += ["## diffusers", "", *_diffusers(name, triggers, files, words, learned, clients), ""]
    return "\n".join(lines)


def _described(learned: Learned, args: TrainArgs) -> list[str]:
    """A line for the denoiser's layers and one for the text encoders', where they were trained."""
    text = {key: update for key, update in learned.trained.items() if key[0] != "denoiser"}
    denoiser = {key: update for key, update in learned.trained.items() if key[0] == "denoiser"}
    lines = [_part(denoiser, args.adapter, "")] if denoiser else []
    lines += [_part(text, args.adapter.for_text(), " of the text encoders")] if text else []
    if learned.off:
        lines.append(f"- written as a plain LoRA, the nearest there is: {learned.reduced_to()}")
    return lines


def _part(modules: Modules, adapter: AdapterArgs, of: str) -> str:
    where = f"layers that match {' or '.join(adapter.match)}" if adapter.match else adapter.targets.replace("+", ", ")
    what = KINDS.get(adapter.kind, adapter.kind)
    found = sorted({rank_and_alpha(update) for update in modules.values()})
    if len(found) == 1 and found[0][0]:
        what += f" of rank {found[0][0]}, alpha {found[0][1]}"
    elif len(found) > 1:
        what += f" of (rank, alpha) {', '.join(f'({rank}, {alpha})' for rank, alpha in found)}"
    return f"- {what}, on {where}{of}"


def _strength(made: Made) -> list[str]:
    """The recommended strength, and what it was taken from."""
    if not made.likeness:
        return ["- strength: 1, with which it was trained; no other was measured"]
    told = [f"{s:g}: {like.pictures:.3f} and {like.prompts:.3f}" for s, like in sorted(made.likeness.items())]
    return [
        f"- strength: {made.strength:g}. Measured on this run's samples, one for each prompt: CLIP's cosine to the "
        f"training pictures and to the prompt, at strength {'; '.join(told)}"
    ]


def comfy_prompt(args: TrainArgs, words: Mapping[str, str]) -> str:
    """A prompt of the run as ComfyUI wants it: `embedding:NAME` for each trigger that has vectors."""
    first = next(iter(words), args.data.triggers[0])
    prompt = args.sample.prompts[0].replace("{trigger}", first) if args.sample.prompts else _example(args, first)
    for trigger in sorted(words, key=len, reverse=True):
        prompt = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", f"embedding:{words[trigger]}", prompt)
    return prompt


def _merged(args: TrainArgs) -> list[str]:
    names = {file: PurePath(file.replace("\\", "/")).name for file in args.model.merge}
    return [f"`{names[file]}` at {strength:g}" for file, strength in args.model.merge.items()]


def _example(args: TrainArgs, trigger: str) -> str:
    """What a picture of the trigger is captioned with that came without a caption."""
    own = [args.data.of(folder) for folder, concept in args.data.concepts.items() if concept.trigger == trigger]
    return (own[0] if own else args.data).own_caption


def _of_folders(args: TrainArgs, trigger: str) -> str:
    folders = [folder for folder, concept in args.data.concepts.items() if concept.trigger == trigger]
    return f" (folder {', '.join(folders)})" if folders else ""


# --- programs with a window


def _programs(
    name: str, triggers: Sequence[str], files: Collection[str], words: Mapping[str, str], strength: float
) -> list[str]:
    embeddings = " and ".join(f"`{word}.safetensors`" for word in words.values())
    kohya, comfy, model = f"{name}.safetensors", f"{name}_comfy.safetensors", f"{name}_model.safetensors"
    lines = ["## ComfyUI", ""]
    lora = kohya if kohya in files else comfy
    if lora in files:
        lines.append(f"Put `{lora}` into `models/loras` and load it with *Load LoRA*.")
    if model in files:
        lines.append(f"`{model}` is the whole model: it goes into `models/checkpoints`, and needs no LoRA beside it.")
    if words:
        lines.append(f"Put {embeddings} into `models/embeddings`.")
    lines.append(_where({t: f"embedding:{words[t]}" if t in words else t for t in triggers}))
    if f"{name}_comfyui.json" in files:
        lines.append(f"`{name}_comfyui.json` is a workflow: drag it onto the window, and choose your base model in it.")
    lines.append("")
    lines += ["## AUTOMATIC1111, Forge", ""]
    if kohya in files:
        lines.append(f"Put `{kohya}` into `models/Lora` and write `<lora:{name}:{strength:g}>` in the prompt.")
    if model in files:
        lines.append(f"`{model}` goes into `models/Stable-diffusion`.")
    if words:
        lines.append(f"Put {embeddings} into `embeddings`.")
    return [*lines, _where({t: words.get(t, t) for t in triggers})]


def _where(said: Mapping[str, str]) -> str:
    """What to write in a prompt; `said` is by trigger."""
    if len(said) == 1:
        return f"In the prompt write `{next(iter(said.values()))}` where the concept stands."
    return "In the prompt write " + ", ".join(f"`{word}` for `{trigger}`" for trigger, word in said.items()) + "."


# --- diffusers


def _diffusers(
    name: str,
    triggers: Sequence[str],
    files: Collection[str],
    words: Mapping[str, str],
    learned: Learned,
    clients: ClientNames,
) -> list[str]:
    """Code that loads what diffusers can load, and why it cannot load the rest."""
    lora = _lora_file(name, files, learned)
    model = f"{name}_model" if f"{name}_model" in files else None
    lines: list[str] = []
    if learned.trained and lora is None and model is None:
        lacks = cannot_say("diffusers", learned.modules(), clients)
        why = f": it reads no {', no '.join(lacks)}" if lacks else " here; export.layouts diffusers writes one"
        lines += [f"There is no file for `load_lora_weights`{why}. `predict.py` draws with `{name}.safetensors`.", ""]
    if model:
        lines += [f"`{model}/` is the whole model, for `DiffusionPipeline.from_pretrained`; it needs no LoRA.", ""]
    if lora or words:
        lines += ["```python", *_code(triggers, lora, words, clients), "```"]
    return lines


def _lora_file(name: str, files: Collection[str], learned: Learned) -> str | None:
    """The file that diffusers loads: its own, or kohya's where that holds plain LoRAs as it reads them."""
    if DIFFUSERS in files:
        return DIFFUSERS
    kohya, modules = f"{name}.safetensors", learned.modules()
    plain = all(isinstance(update, LoraTensors) and update.magnitude is None for update in modules.values())
    text = [path for component, path in modules if component != "denoiser"]
    named = not text or any(path.endswith("out_proj") for path in text)  # else it is taken for something else
    return kohya if kohya in files and plain and named else None


def _code(triggers: Sequence[str], lora: str | None, words: Mapping[str, str], clients: ClientNames) -> list[str]:
    lines = [f'pipe.load_lora_weights(".", weight_name="{lora}")'] if lora else []
    tokens = diffusers_tokens(triggers)
    for trigger, word in words.items():
        lines += _loading(word, json.dumps(tokens[trigger]), clients)
    said = [tokens[trigger] if trigger in words else trigger for trigger in triggers]
    return [*lines, f"picture = pipe({json.dumps(f'a photo of {said[0]}')}).images[0]"] + [
        f"picture = pipe({json.dumps(f'a photo of {word}')}).images[0]" for word in said[1:]
    ]


def _loading(word: str, token: str, clients: ClientNames) -> list[str]:
    """Of one embedding. Of several text encoders diffusers is told which vectors are whose."""
    if len(clients.embeddings) == 1:
        return [f'pipe.load_textual_inversion("{word}.safetensors", token={token})']
    lines = ["from safetensors.torch import load_file", f'vectors = load_file("{word}.safetensors")']
    for encoder, key in clients.embeddings.items():
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        place = f"text_encoder=pipe.{encoder}, tokenizer=pipe.{tokenizer}"
        lines.append(f'pipe.load_textual_inversion(vectors["{key}"], token={token}, {place})')
    return lines
