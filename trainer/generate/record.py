"""Pictures as files: their names, and what they were made from in their text chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer import environment
from trainer.generate.painter import Look, Painter, Weighted
from trainer.schedulers import SCHEDULERS

OURS, UIS = "tempera", "parameters"  # names of the chunks; the second is AUTOMATIC1111's, which other UIs read


def free_names(folder: Path, endings: Sequence[str]) -> list[Path]:
    """A new file for each ending (`0012_seed7.png` for seed7); pictures from before are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name[:4]) for path in folder.glob("[0-9][0-9][0-9][0-9]_*.png")]
    first = max(taken, default=-1) + 1
    return [folder / f"{first + index:04d}_{ending}.png" for index, ending in enumerate(endings)]


def facts(
    painter: Painter, look: Look, prompt: str, seed: int, size: tuple[int, int], start: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """All that the picture can be drawn from again. Of paths only the last names are in it.

    Args:
        size: width and height that came out.
        start: name -> sha256 of the picture that was begun with, and of its mask.
    """
    model = painter.model
    said: dict[str, Any] = {
        "prompt": prompt,
        "negative": look.negative,
        "seed": seed,
        "steps": look.steps,
        "guidance": look.guidance,
        "guidance_rescale": look.rescale,
        "scheduler": look.scheduler or painter.scheduler,
        "width": size[0],
        "height": size[1],
        "batch_size": look.batch,
        "base": {
            "name": _last(model.base),
            "revision": model.revision,
            "family": painter.family.name,
            "dtype": model.dtype,
            "merged": {_last(file): strength for file, strength in model.merge.items()},
        },
        "weights": [_of_weights(one) for one in painter.used],
        "versions": environment.versions("torch", "diffusers"),
    }
    if look.start is not None:
        said["start"] = {"strength": look.start.strength, "files": dict(start or {})}
    return said


def _of_weights(one: Weighted) -> dict[str, Any]:
    strength = one.strength
    return {
        "name": one.learned.name,
        "files": dict(one.learned.files),
        "layers": len(one.learned.updates),
        "triggers": sorted(one.learned.words),
        "strength": strength.overall,
        "blocks": dict(strength.blocks),
        "tokens": strength.of_tokens,
    }


def _last(path: str) -> str:
    """The last name of a local path; a hub id whole."""
    return PurePath(path.replace("\\", "/")).name if Path(path).exists() or len(Path(path).parts) != 2 else path


def parameters(said: Mapping[str, Any]) -> str:
    """The facts in the words of AUTOMATIC1111's infotext: the prompt, what to avoid, and one line of settings.

    LoRAs stand in the prompt as `<lora:NAME:STRENGTH>`, which has no word for strengths by block.
    """
    loras = [f"<lora:{w['name']}:{w['strength']:g}>" for w in said["weights"] if w["layers"]]
    lines = [" ".join([said["prompt"], *loras])]
    if said["negative"]:
        lines.append(f"Negative prompt: {said['negative']}")
    entry = SCHEDULERS.get(said["scheduler"])
    settings: dict[str, Any] = {
        "Steps": said["steps"],
        "Sampler": entry.title if entry else said["scheduler"],
        "Schedule type": entry.evenly if entry else "Automatic",
        "CFG scale": f"{said['guidance']:g}",
        "Seed": said["seed"],
        "Size": f"{said['width']}x{said['height']}",
        "Model": said["base"]["name"],
    }
    if "start" in said:
        settings["Denoising strength"] = f"{said['start']['strength']:g}"
    if said["guidance_rescale"]:
        settings["CFG Rescale"] = f"{said['guidance_rescale']:g}"
    settings["Version"] = "tempera"
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items())])


def _quoted(value: str) -> str:
    """Values that hold a separator are JSON strings there."""
    return json.dumps(value, ensure_ascii=False) if any(sign in value for sign in ',:"\n') else value


def save(picture: Image.Image, file: Path, said: Mapping[str, Any]) -> None:
    """Writes a PNG beside its place and renames it, with its facts in the chunks `tempera` and `parameters`."""
    info = PngInfo()
    info.add_text(OURS, json.dumps(said))
    info.add_text(UIS, parameters(said))
    temporary = file.with_name(f".{file.name}.writing")
    try:
        picture.save(temporary, "PNG", pnginfo=info)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
