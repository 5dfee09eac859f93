"""Tells bases apart by what is in them: a digest of each part's weights and config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Weights:
    """The tensors of a base by part, as they are before any adapter renames or joins them. Nothing is copied."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        self._digests: dict[str, str] = {}

    def remember(self, part: str, module: nn.Module, config: Mapping[str, Any], beside: str = "") -> None:
        """Keeps hold of a part; `beside` is more text that its results depend on, such as a tokenizer."""
        self._parts[part] = (module.state_dict(), _config_text(config) + beside)

    def digest(self, part: str) -> str:
        """Hex digest of names, dtypes, shapes and values of the tensors, and of the config."""
        if part not in self._digests:
            tensors, config = self._parts[part]
            digest = hashlib.sha256(config.encode())
            for name, tensor in sorted(tensors.items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            self._digests[part] = digest.hexdigest()
            del self._parts[part]  # a part that changed its dtype meanwhile would be held twice
        return self._digests[part]


def _config_text(config: Mapping[str, Any]) -> str:
    """The config without what differs between copies of one model: paths and library versions."""
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in ("transformers_version", "dtype")}
    return json.dumps(kept, sort_keys=True, default=str)
