"""A workflow for ComfyUI, in its API format: what the files are for, ready to be run.

The nodes are those of ComfyUI itself (nodes.py, and ModelSamplingDiscrete of comfy_extras), by the names of their
inputs there; a link is [number of a node, number of its output].
"""

from __future__ import annotations

import json
from typing import Any

from trainer.args import TrainArgs
from trainer.export.names import base_name
from trainer.types import ModelFamily

Node = dict[str, Any]


def workflow(
    name: str,
    prompt: str,
    args: TrainArgs,
    family: ModelFamily,
    *,
    lora: str | None,
    model: str | None,
    strength: float,
) -> str:
    """The JSON text.

    Args:
        prompt: as ComfyUI wants it, with `embedding:NAME` for a trigger that has vectors.
        lora, model: the files that hold what layers learned, of which one is used; None where there is none.
    """
    nodes: dict[str, Node] = {"1": _node("CheckpointLoaderSimple", ckpt_name=model or _checkpoint(args))}
    unet, clip = ["1", 0], ["1", 1]
    if lora and not model:
        nodes["2"] = _node(
            "LoraLoader", model=unet, clip=clip, lora_name=lora, strength_model=strength, strength_clip=strength
        )
        unet, clip = ["2", 0], ["2", 1]
    if family.path.target == "v_prediction" and family.name != "sdxl":  # what ComfyUI cannot see in such a checkpoint
        nodes["3"] = _node("ModelSamplingDiscrete", model=unet, sampling="v_prediction", zsnr=_ends_in_noise(family))
        unet = ["3", 0]
    sample = args.sample
    nodes["4"] = _node("CLIPTextEncode", text=prompt, clip=clip)
    nodes["5"] = _node("CLIPTextEncode", text=sample.negative, clip=clip)
    width, height = sample.width or family.resolution, sample.height or family.resolution
    nodes["6"] = _node("EmptyLatentImage", width=width, height=height, batch_size=1)
    nodes["7"] = _node(
        "KSampler",
        model=unet,
        positive=["4", 0],
        negative=["5", 0],
        latent_image=["6", 0],
        seed=sample.seed,
        steps=sample.steps,
        cfg=sample.guidance,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    nodes["8"] = _node("VAEDecode", samples=["7", 0], vae=["1", 2])
    nodes["9"] = _node("SaveImage", images=["8", 0], filename_prefix=name)
    return json.dumps(nodes, indent=2, ensure_ascii=False) + "\n"


def _node(kind: str, **inputs: object) -> Node:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def _checkpoint(args: TrainArgs) -> str:
    """The base's file as it lies in ComfyUI; of a folder or a hub id the name that one would give to it."""
    name = base_name(args)
    return name if name.endswith(".safetensors") else f"{name}.safetensors"


def _ends_in_noise(family: ModelFamily) -> bool:
    """Whether nothing of the picture is left at the last level (zero terminal SNR)."""
    return float(family.path.alphas_cumprod[-1]) < 1e-6
