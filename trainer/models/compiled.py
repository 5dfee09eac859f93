"""A UNet whose transformer blocks torch compiles: each kind of block once, when it is first called."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

from trainer.types import BaseModelError

log = logging.getLogger(__name__)

KINDS = 64  # of blocks: each width, number of tokens and batch, in training and in drawing; beyond, torch compiles none


def compile_blocks(unet: Any, device: torch.device) -> None:
    """Has the repeated blocks compiled, with what is attached to them by then; shapes that differ compile anew.

    Raises:
        BaseModelError: what the compiler needs for `device` is not here.
    """
    lacking = _lacking(device)
    if lacking:
        raise BaseModelError(f"model.compile is blocks, and torch cannot compile for {device} here: {lacking}")
    config: Any = importlib.import_module("torch._dynamo.config")
    config.recompile_limit = max(config.recompile_limit, KINDS)  # torch has no such limit for a single module
    unet.compile_repeated_blocks()
    log.info("the first steps take longer: torch compiles the denoiser's blocks (model.compile)")


def _lacking(device: torch.device) -> str | None:
    """What torch's compiler would not find; None where all is there."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "it needs the package triton, and a GPU that triton knows; leave it out"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "it needs a C++ compiler (g++ or clang++), or CXX to name one; install it, or leave model.compile out"
    return None
