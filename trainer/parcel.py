"""What training hands back in one file, laid out for whoever opens it, with a card that says how.

lora.safetensors          what the layers learned, in kohya's layout
embeddings.safetensors    the vectors of the trigger; with several triggers embeddings_<trigger>.safetensors
embeddings.pti            all vectors as predictors of cog-sdxl read them, with
special_params.json       trigger -> the tokens <s0><s1>... that stand for it there
args.json, captions/, grid.png, samples/, README.md, report.html, metrics.jsonl, env.json
export/                   files of other layouts, where such were asked for
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.args import TrainArgs
from trainer.dataset import read_manifest
from trainer.export import embedding_name, embedding_names
from trainer.export.names import diffusers_token
from trainer.rundir import RunDir

LORA, EMBEDDINGS, PTI, TOKENS = "lora.safetensors", "embeddings.safetensors", "embeddings.pti", "special_params.json"
ROOT = Path(__file__).resolve().parent.parent


def laid_out(run: RunDir, folder: Path) -> Path:
    """The files of a finished run in `folder`, which is made. Nothing in them names a path of this machine."""
    folder.mkdir(parents=True)
    args = TrainArgs.model_validate_json(run.args.read_text(encoding="utf-8"))
    name = args.runtime.name
    renamed = {f"{name}.safetensors": LORA, **_embeddings(run, args)}
    for path in sorted(run.export.iterdir()):
        if path.name in renamed:
            shutil.copyfile(path, folder / renamed[path.name])
        elif path.name != "README.md":
            (folder / "export").mkdir(exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / "export" / path.name)
    _pivotal(folder, {trigger: folder / renamed[file] for trigger, file in _files(run, args).items()})
    (folder / "captions").mkdir()
    for item in read_manifest(run.dataset):
        (folder / "captions" / f"{item.name}.txt").write_text("\n".join(item.captions or (item.caption,)) + "\n")
    for path in (run.metrics, run.env, run.grid):
        if path.exists():
            shutil.copyfile(path, folder / path.name)
    report = run.report.read_text(encoding="utf-8")
    for here, said in ((args.data.source, "pictures"), (args.runtime.out, "runs"), (args.model.base, _base(args))):
        report = report.replace(here, said)
    (folder / run.report.name).write_text(report, encoding="utf-8")
    samples = sorted(run.samples.glob("after_1/*.png"))
    for number, path in enumerate(samples):
        (folder / "samples").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "samples" / f"{number:02d}.png")
    (folder / "args.json").write_text(json.dumps(_public(args), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(folder, args), encoding="utf-8")
    return folder


def packed(folder: Path, path: Path) -> Path:
    """An uncompressed tar of what is in `folder`."""
    with tarfile.open(path, "w") as tar:
        for part in sorted(folder.iterdir()):
            tar.add(part, arcname=part.name, filter=_nobodys)
    return path


def weights_of(folder: Path) -> tuple[Path, list[Path]] | None:
    """(the file of the layers, which may be missing, the embeddings) of what was packed; None of any other folder."""
    lora, embeddings = folder / LORA, sorted(folder.glob("embeddings*.safetensors"))
    return (lora, embeddings) if lora.is_file() or embeddings else None


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry


def _files(run: RunDir, args: TrainArgs) -> dict[str, str]:
    """Trigger -> its embedding file in the run's export."""
    name, triggers = args.runtime.name, list(args.data.triggers)
    names = embedding_names(name, triggers) if len(triggers) > 1 else {triggers[0]: embedding_name(name)}
    there = {trigger: f"{word}.safetensors" for trigger, word in names.items()}
    return {trigger: file for trigger, file in there.items() if (run.export / file).is_file()}


def _embeddings(run: RunDir, args: TrainArgs) -> dict[str, str]:
    files = _files(run, args)
    if len(files) == 1:
        return {next(iter(files.values())): EMBEDDINGS}
    return {
        file: f"embeddings{file.removeprefix(args.runtime.name).replace('_embedding', '')}" for file in files.values()
    }


def _pivotal(folder: Path, embeddings: Mapping[str, Path]) -> None:
    """The vectors of all triggers, one below the other, as TokenEmbeddingsHandler of cog-sdxl reads them."""
    rows: list[list[Tensor]] = []
    tokens: dict[str, str] = {}
    first = 0
    for trigger, path in embeddings.items():
        tensors = load_file(path)
        count = len(next(iter(tensors.values())))
        tokens[trigger] = "".join(f"<s{first + index}>" for index in range(count))
        first += count
        rows.append([tensors[key] for key in sorted(tensors, key=_encoder)])
    if rows:
        state = {f"text_encoders_{i}": torch.cat(parts).contiguous() for i, parts in enumerate(zip(*rows, strict=True))}
        save_file(state, folder / PTI)
        (folder / TOKENS).write_text(json.dumps(tokens), encoding="utf-8")


def _encoder(key: str) -> int:
    """Which text encoder a key is for, in the order of a pipeline."""
    return {"emb_params": 0, "clip_l": 0, "clip_g": 1}[key]


def _public(args: TrainArgs) -> dict[str, object]:
    """The args without the paths of this machine."""
    tree = args.model_dump(mode="json")
    tree["data"]["source"] = "pictures"
    tree["runtime"]["out"] = "runs"
    tree["model"]["base"] = _base(args)
    return tree


def _base(args: TrainArgs) -> str:
    """As it can be found elsewhere; a folder of this machine alone by its name."""
    base = Path(args.model.base)
    if not base.is_absolute():
        return args.model.base
    return str(base.relative_to(ROOT)) if base.is_relative_to(ROOT) else base.name


# --- the card


def card(folder: Path, args: TrainArgs) -> str:
    """README.md of the files in `folder`: a model card of the Hub, whose header is YAML."""
    triggers = list(args.data.triggers)
    base = _base(args)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not (ROOT / base).exists()
    samples = sorted(folder.glob("samples/*.png"))
    header: dict[str, object] = {"tags": ["text-to-image", "lora", "diffusers", "template:sd-lora"]}
    header |= {"library_name": "diffusers", "instance_prompt": ", ".join(triggers)}
    if on_hub:
        header["base_model"] = base
    shown = list(zip(args.sample.prompts, samples, strict=False))
    if shown:
        header["widget"] = [{"text": prompt, "output": {"url": f"samples/{p.name}"}} for prompt, p in shown]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [
        f"# {triggers[0]}",
        "",
        f"Write {' or '.join(f'`{word}`' for word in triggers)} where the concept stands.",
        "",
    ]
    lines += [f"- base model: {f'[{base}](https://huggingface.co/{base})' if on_hub else base}"]
    lines += [f"- {_described(args)}", ""]
    lines += [f"![{prompt}](samples/{path.name})" for prompt, path in shown]
    lines += [
        "",
        *_programs(folder, triggers),
        "",
        "## Args",
        "",
        "`args.json` trains it again from the same pictures.",
    ]
    return "\n".join(lines) + "\n"


def _described(args: TrainArgs) -> str:
    adapter = "" if args.adapter.kind == "none" else f"{args.adapter.kind}, rank {args.adapter.rank}; "
    tokens = f"{args.text.tokens} token vectors; " if args.text.tokens else ""
    return f"{adapter}{tokens}{args.runtime.steps} updates of {args.runtime.batch_size} pictures"


def _programs(folder: Path, triggers: list[str]) -> list[str]:
    """How each program loads what is there."""
    lora = (folder / LORA).is_file()
    files = sorted(folder.glob("embeddings*.safetensors"))
    words = {path.stem: _trigger(path, triggers) for path in files}
    lines = ["## diffusers", "", "```python"]
    if lora:
        lines.append(f'pipe.load_lora_weights(".", weight_name="{LORA}")')
    for path in files:
        lines += _loading(path, diffusers_token(words[path.stem]))
    said = [diffusers_token(word) if word in words.values() else word for word in triggers]
    lines += [f'picture = pipe("a photo of {said[0]}").images[0]', "```", "", "## ComfyUI", ""]
    if lora:
        lines.append(f"Put `{LORA}` into `models/loras` and load it with *Load LoRA*.")
    for stem, word in words.items():
        lines.append(f"Put `{stem}.safetensors` into `models/embeddings`, and write `embedding:{stem}` for `{word}`.")
    lines += ["", "## AUTOMATIC1111, Forge", ""]
    if lora:
        lines.append(f"Put `{LORA}` into `models/Lora`, and write `<lora:{Path(LORA).stem}:1>` in the prompt.")
    lines += [f"Put `{s}.safetensors` into `embeddings`, and write `{s}` for `{word}`." for s, word in words.items()]
    if words:
        lines += [
            "",
            "Those two take the name of a file for the word: rename files, and mind that yours are the only ones.",
        ]
    return lines


def _loading(path: Path, token: str) -> list[str]:
    """diffusers takes one encoder's vectors at a time where there are two."""
    keys = sorted(load_file(path), key=_encoder)
    if len(keys) == 1:
        return [f'pipe.load_textual_inversion("{path.name}", token="{token}")']
    lines = ["from safetensors.torch import load_file", f'vectors = load_file("{path.name}")']
    for key, number in zip(keys, ("", "_2"), strict=True):
        place = f"text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number}"
        lines.append(f'pipe.load_textual_inversion(vectors["{key}"], token="{token}", {place})')
    return lines


def _trigger(path: Path, triggers: list[str]) -> str:
    """As the file says; without a word of it, the only one."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("modelspec.trigger_phrase", triggers[0])
