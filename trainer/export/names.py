"""What files and tokens are called: names that programs take as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from trainer.args import TrainArgs

DIFFUSERS = "pytorch_lora_weights.safetensors"


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


def base_name(args: TrainArgs) -> str:
    """The last part of the base's path or hub id."""
    return PurePath(args.model.base.replace("\\", "/")).name or args.model.base
