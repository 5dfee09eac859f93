"""For which kind of base a file of updates is, told by its names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from trainer.layouts.container import Entry

TITLES = {
    "sd15": "Stable Diffusion 1.5",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
}
# What only one kind of base has in its names.
NAMES = {
    "flux": r"double_blocks|single_blocks|single_transformer_blocks",
    "sd3": r"joint_blocks|add_q_proj|context_block",
    "sdxl": r"lora_te2_|text_encoder_2\.|clip_g\.|add_embedding|label_emb|transformer_blocks[._][2-9][._]",
}
TEXT_READS = re.compile(r"attn2[._](processor\.)?to_[kv][._]")  # layers whose input is the text
WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}  # of the text, as the denoiser reads it
TOWERS = {768: "sd15", 1024: "sd2"}  # of the only text encoder


def kind_of(entries: Mapping[str, Entry]) -> str | None:
    """The title of the kind of base; None where nothing tells."""
    name = family_of(entries)
    return TITLES[name] if name else None


def family_of(entries: Mapping[str, Entry]) -> str | None:
    """Its short name: sd15, sd2, sdxl, sd3 or flux."""
    for family, pattern in NAMES.items():
        if any(re.search(pattern, key) for key in entries):
            return family
    for key, entry in entries.items():
        if TEXT_READS.search(key) and (found := WIDTHS.get(_width(key, entry))):
            return found
    for key, entry in entries.items():
        if re.search(r"q_proj|fc1", key) and (found := TOWERS.get(_width(key, entry))):
            return found
    return None


def _width(key: str, entry: Entry) -> int:
    """Inputs of the layer, where a tensor has them as its second side; else 0."""
    inner = re.search(r"down\.|lora_A|_w1_b|diff$", key)
    return entry.shape[1] if inner and len(entry.shape) > 1 else 0
