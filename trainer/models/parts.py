"""Reads all parts of a base: from a diffusers folder or hub id, or from a single file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTokenizer

from trainer.args import ModelArgs
from trainer.models import load
from trainer.types import BaseModelError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """A base as it was read: networks in one dtype, on the CPU."""

    tokenizers: dict[str, Any]  # by text encoder: "text_encoder", "text_encoder_2"
    text_encoders: dict[str, Any]
    vae: Any
    unet: Any
    scheduler: Any
    index: Mapping[str, Any]  # what model_index.json says of the pipeline


def read(args: ModelArgs, pipeline: str, towers: Mapping[str, Any]) -> Parts:
    """The base that `args.base` names, in `args.dtype`.

    Args:
        pipeline: the diffusers pipeline that reads it as a single file.
        towers: text encoder -> its class.

    Raises:
        BaseModelError: a part is missing or damaged.
    """
    dtype = load.DTYPES[args.dtype]
    if load.is_single_file(args.base):
        return _single_file(args, pipeline, towers, dtype)
    return _folder(args, towers, dtype)


def forget_paths(file: Path) -> None:
    """Takes out of a settings file where its model was loaded from, which libraries write there."""
    settings: Any = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(settings, dict):
        found = cast(dict[str, Any], settings)
        kept = {key: value for key, value in found.items() if key not in ("_name_or_path", "name_or_path")}
        if kept != found:
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def tokenizer_of(tower: str) -> str:
    """`text_encoder_2` -> `tokenizer_2`, as diffusers calls the parts of a pipeline."""
    return tower.replace("text_encoder", "tokenizer")


def _folder(args: ModelArgs, towers: Mapping[str, Any], dtype: torch.dtype) -> Parts:
    base, revision = args.base, args.revision
    index = load.model_index(base, revision)
    return Parts(
        tokenizers={name: load.settings(CLIPTokenizer, base, tokenizer_of(name), revision) for name in towers},
        text_encoders={name: load.part(kind, base, name, revision, dtype) for name, kind in towers.items()},
        vae=load.part(AutoencoderKL, base, "vae", revision, dtype),
        unet=load.part(UNet2DConditionModel, base, "unet", revision, dtype),
        scheduler=load.settings(_scheduler_class(base, index["scheduler"][1]), base, "scheduler", revision),
        index=index,
    )


def _scheduler_class(base: str, name: str) -> Any:
    import diffusers

    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise BaseModelError(f"base {base!r} names the scheduler {name!r}, which diffusers does not have")
    return kind


def _single_file(args: ModelArgs, pipeline: str, towers: Mapping[str, Any], dtype: torch.dtype) -> Parts:
    import diffusers

    reader: Any = getattr(diffusers, pipeline).from_single_file
    spare = {"safety_checker": None} if pipeline == "StableDiffusionPipeline" else {}
    try:
        pipe = reader(args.base, config=args.config, dtype=dtype, **spare)
    except load.LOAD_ERRORS as error:
        hint = f"does model.config {args.config!r} fit it?" if args.config else "set model.config to a diffusers folder"
        why = load.first_line(error)
        if "meta tensor" in why:  # what diffusers says of weights that it built and found nothing for
            why = "it lacks weights of the model that its config describes"
        raise BaseModelError(
            f"base {args.base!r} cannot be read ({why}); a single file holds neither configs nor tokenizer: {hint}"
        ) from error
    return Parts(
        tokenizers={name: getattr(pipe, tokenizer_of(name)) for name in towers},
        text_encoders={name: getattr(pipe, name) for name in towers},
        vae=pipe.vae,
        unet=pipe.unet,
        scheduler=stated(pipe.scheduler, load.single_file_keys(args.base), load.single_file_facts(args.base)),
        index=dict(pipe.config),
    )


def stated(scheduler: Any, keys: set[str], facts: Mapping[str, str]) -> Any:
    """The scheduler with what the file itself says of its noise: that counts more than the configs from elsewhere.

    Tensors named `v_pred` and `ztsnr` mark a v-prediction and a zero-terminal-SNR checkpoint (arXiv 2305.08891), and
    so does modelspec.prediction_type of the former.
    """
    said: dict[str, Any] = {}
    prediction = facts.get("modelspec.prediction_type")
    if "v_pred" in keys or prediction == "v":
        said["prediction_type"] = "v_prediction"
    elif prediction == "epsilon":
        said["prediction_type"] = "epsilon"
    if "ztsnr" in keys:
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if not said:
        return scheduler
    kind = type(scheduler)
    if "ztsnr" in keys and "rescale_betas_zero_snr" not in scheduler.config:
        kind = EulerDiscreteScheduler  # PNDM, for one, cannot start at a level without a picture
    log.info("the file says of its noise: %s", ", ".join(f"{key} {value}" for key, value in said.items()))
    return kind.from_config({**scheduler.config, **said})
