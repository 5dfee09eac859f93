"""How programs spell the tensors of an update: key -> (name of the layer, what it is of the layer's update).

What is told apart here, and where each spelling was found, is in docs/imports.md.
"""

from __future__ import annotations

import re

# End of a key -> the end that stands for it here, which is kohya's and LyCORIS's where they have one.
ENDS = {
    **{f".{end}": end for end in ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale")},
    **{f".hada_{end}": f"hada_{end}" for end in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{end}": f"lokr_{end}" for end in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",  # LyCORIS of a norm
    ".b_norm": "diff_b",
    ".lora_A.weight": "lora_down.weight",  # PEFT, and diffusers since it uses PEFT
    ".lora_B.weight": "lora_up.weight",
    ".lora_A.default.weight": "lora_down.weight",  # of a PEFT model's own state_dict
    ".lora_B.default.weight": "lora_up.weight",
    ".lora_A": "lora_down.weight",
    ".lora_B": "lora_up.weight",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".lora_magnitude_vector.default.weight": "lora_magnitude_vector",
    "_lora.down.weight": "lora_down.weight",  # diffusers' attention processors, cog-sdxl
    "_lora.up.weight": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",  # diffusers before PEFT
    ".lora.up.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",  # the same, of text encoders
    ".lora_linear_layer.up.weight": "lora_up.weight",
}
LONGEST_FIRST = sorted(ENDS, key=len, reverse=True)
WRAPPERS = ("base_model.model.", "base_model.")  # of PEFT
TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
BUNDLED = "bundle_emb."  # embeddings inside a LoRA file: OneTrainer, A1111


def split(key: str) -> tuple[str, str] | None:
    """(name, end) of a key; None if its end is no part of an update that is understood."""
    for spelled in LONGEST_FIRST:
        if key.endswith(spelled) and len(key) > len(spelled):
            return _settled(key.removesuffix(spelled)), ENDS[spelled]
    return None


def _settled(name: str) -> str:
    """The name without what only some versions of a program put into it."""
    for wrapper in WRAPPERS:
        if name.startswith(wrapper):
            name = name.removeprefix(wrapper)
            break
    name = name.replace(".processor.", ".")
    if found := re.fullmatch(r"(.*\.self_attn)\.(to_q|to_k|to_v|to_out)", name):
        return f"{found[1]}.{TEXT[found[2]]}"
    return re.sub(r"(\.attn\d*\.to_out)$", r"\1.0", name)
