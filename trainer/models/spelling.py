"""How clients spell the parts of families made of CLIP text towers and a UNet.

SDXL's UNet goes by the names of its first release (sgm, which are LDM's) in kohya files: in the spelling of diffusers
some clients lose layers of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}

Spelling = Callable[[str, str], str]  # (component, module path) -> key without suffix


def kohya(prefixes: Mapping[str, str], unet_path: Callable[[str], str] = str) -> Spelling:
    """`down_blocks.0.attentions.0...` -> `lora_unet_down_blocks_0_attentions_0_...`.

    Args:
        prefixes: component -> "lora_unet", "lora_te", ...
        unet_path: a path of diffusers -> the path that this kind of file goes by.
    """

    def name(component: str, path: str) -> str:
        own = unet_path(path) if component == "denoiser" else client_path(path)
        return f"{prefixes[component]}_{own}".replace(".", "_")

    return name


def diffusers(component: str, path: str) -> str:
    """`down_blocks.0.attentions.0...` -> `unet.down_blocks.0.attentions.0...`."""
    return f"unet.{path}" if component == "denoiser" else f"{component}.{client_path(path)}"


TEXT_PREFIXES = {
    "text_encoder": ("lora_te", "lora_te1", "clip_l", "text_encoder"),
    "text_encoder_2": ("lora_te2", "clip_g", "text_encoder_2"),
}


def others(component: str, path: str, unet_path: Callable[[str], str]) -> list[str]:
    """The names of a layer in files of all programs that docs/imports.md lists.

    Args:
        unet_path: a path of diffusers -> that of the original code, see `ldm_paths`.
    """
    if component == "denoiser":
        paths = (path, unet_path(path))
        prefixes = ("lora_unet_", "unet_", "unet.", "lycoris_", "diffusion_model.", "")
    else:
        flat = path.removeprefix("text_model.")
        paths = (flat, f"text_model.{flat}")
        prefixes = ("", *(f"{prefix}{sign}" for prefix in TEXT_PREFIXES[component] for sign in "._"))
    names = {f"{prefix}{own}" for own in paths for prefix in prefixes}
    return [name.replace(".", "_") if name.startswith(("lora_", "lycoris_", "unet_")) else name for name in names]


def comfy(unet_path: Callable[[str], str]) -> Spelling:
    """The UNet by ComfyUI's own module paths (`diffusion_model.input_blocks...`), towers by those that it shares."""

    def name(component: str, path: str) -> str:
        return f"diffusion_model.{unet_path(path)}" if component == "denoiser" else diffusers(component, path)

    return name


def client_path(path: str) -> str:
    """transformers 5 dropped the `text_model` level of a CLIP tower, which every client expects in a name."""
    return path if path.startswith("text_model.") else f"text_model.{path}"


def ldm_paths(config: Any) -> Callable[[str], str]:
    """Module path of a diffusers UNet with this config -> its path in the original code (LDM, sgm)."""
    layers: int = config.layers_per_block
    attended: Sequence[bool] = ["CrossAttn" in kind for kind in config.up_block_types]

    def path_of(path: str) -> str:
        for ours, theirs in OUTSIDE_BLOCKS.items():
            if path == ours or path.startswith(f"{ours}."):
                return theirs + path.removeprefix(ours)
        where, *rest = path.split(".")
        if where == "mid_block":
            kind, tail = rest[0], rest[2:]
            place = MIDDLE[f"{kind}.{rest[1]}"]
        else:
            block, kind, layer, tail = int(rest[0]), rest[1], int(rest[2]), rest[3:]
            place = _place(where, block, kind, layer, layers, attended)
        if kind == "resnets" and tail:
            tail = [RESNET[tail[0]], *tail[1:]]
        if kind == "downsamplers":
            tail = ["op", *tail[1:]]
        return ".".join([place, *tail])

    return path_of


def _place(where: str, block: int, kind: str, layer: int, layers: int, attended: Sequence[bool]) -> str:
    """`input_blocks.4.1`: in LDM the layers of all blocks are counted through, and each has its parts by number."""
    if where == "down_blocks":
        first = 1 + block * (layers + 1)
        last = kind == "downsamplers"
        return f"input_blocks.{first + layers}.0" if last else f"input_blocks.{first + layer}.{_n(kind)}"
    first = block * (layers + 1)
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if attended[block] else 1}"
    return f"output_blocks.{first + layer}.{_n(kind)}"


def _n(kind: str) -> int:
    return {"resnets": 0, "attentions": 1}[kind]
