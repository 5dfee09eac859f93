"""Updates as the kohya and the diffusers layout spell them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.layouts.container import LayoutError
from trainer.types import ClientNames
from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, Update

Modules = Mapping[tuple[str, str], Update]  # (component, module path) -> its update


def kohya_state(modules: Modules, clients: ClientNames) -> dict[str, Tensor]:
    """`<kohya name>.lora_down.weight`, `.alpha` (0-d), ... for each module, as ComfyUI, Forge and A1111 read them.

    Raises:
        LayoutError: two modules share a name, or lengths are of rows, which clients do not read alike.
    """
    state: dict[str, Tensor] = {}
    names = {key: clients.kohya(*key) for key in modules}
    if len(set(names.values())) < len(names):
        raise LayoutError("two modules share one kohya name; this denoiser cannot be written in the kohya layout")
    for key, update in modules.items():
        state |= {f"{names[key]}.{end}": tensor for end, tensor in _ends(update).items()}
    return state


def _ends(update: Update) -> dict[str, Tensor]:
    if isinstance(update, LoraTensors):
        ends = {
            "lora_down.weight": update.down,
            "lora_up.weight": update.up,
            "alpha": torch.tensor(update.alpha),
        }
        if update.magnitude is not None:
            if by_rows(update.magnitude):
                raise LayoutError("clients read lengths of rows in different ways; write the difference instead")
            ends["dora_scale"] = update.magnitude
        return ends
    if isinstance(update, LohaTensors):
        factors = {f"hada_{name}": getattr(update, name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
        return {**factors, "alpha": torch.tensor(update.alpha)}
    if isinstance(update, LokrTensors):
        return _lokr(update)
    bias = {} if update.bias is None else {"diff_b": update.bias}
    return {"diff": update.weight, **bias}


def _lokr(update: LokrTensors) -> dict[str, Tensor]:
    """Clients take alpha / rank only where a factor is of low rank; else the scale goes into w1."""
    ranks = [pair[1].shape[0] for pair in (update.w1, update.w2) if len(pair) == 2]
    first = update.w1[0] if ranks else update.w1[0] * update.scale
    ends: dict[str, Tensor] = {}
    for name, tensors in (("w1", (first, *update.w1[1:])), ("w2", update.w2)):
        if len(tensors) == 1:
            ends[f"lokr_{name}"] = tensors[0]
        else:
            ends |= {f"lokr_{name}_a": tensors[0], f"lokr_{name}_b": tensors[1]}
    return {**ends, "alpha": torch.tensor(update.scale * ranks[0] if ranks else 1.0)}


def by_rows(magnitude: Tensor) -> bool:
    """Whether lengths are of rows, [o, 1(, 1, 1)], not of columns, [1, i(, 1, 1)]."""
    return magnitude.shape[0] != 1


def diffusers_lacks(modules: Modules) -> str | None:
    """Why diffusers cannot read these updates; None if it can."""
    for update in modules.values():
        if isinstance(update, LoraTensors):
            if update.magnitude is not None and not by_rows(update.magnitude):
                return "diffusers knows DoRA over the output axis only (adapter.axis output)"
        elif isinstance(update, Difference):
            return "diffusers reads no differences of weights"
        else:
            return f"diffusers reads no {'LoHa' if isinstance(update, LohaTensors) else 'LoKr'}"
    return None


def diffusers_state(modules: Modules, clients: ClientNames) -> dict[str, Tensor]:
    """`unet.<path>.lora_A.weight`, `.lora_B.weight` and, for DoRA, `.lora_magnitude_vector` in PEFT's shape.

    Raises:
        LayoutError: what `diffusers_lacks` says.
    """
    lacks = diffusers_lacks(modules)
    if lacks:
        raise LayoutError(lacks)
    state: dict[str, Tensor] = {}
    for (component, path), update in modules.items():
        assert isinstance(update, LoraTensors)
        key = clients.diffusers(component, path)
        state[f"{key}.lora_A.weight"] = update.down
        state[f"{key}.lora_B.weight"] = update.up
        if update.magnitude is not None:
            lengths = update.magnitude.flatten()
            convolution = update.magnitude.ndim == 4
            state[f"{key}.lora_magnitude_vector"] = lengths.reshape(1, -1, 1, 1) if convolution else lengths
    return state


def diffusers_metadata(modules: Modules, clients: ClientNames) -> str:
    """JSON of the LoraConfig arguments by component: in this layout it is what carries alpha."""
    facts: dict[str, object] = {}
    for component in dict.fromkeys(component for component, _ in modules):
        own = {path: update for (c, path), update in modules.items() if c == component}
        ranks = {path: update.down.shape[0] for path, update in own.items() if isinstance(update, LoraTensors)}
        alphas = {path: update.alpha for path, update in own.items() if isinstance(update, LoraTensors)}
        rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
        prefix = clients.diffusers(component, "").split(".")[0]
        facts |= {
            f"{prefix}.r": rank,
            f"{prefix}.lora_alpha": alpha,
            f"{prefix}.target_modules": sorted(own),
        }
        patterns = {
            "rank_pattern": {_exactly(path): other for path, other in ranks.items() if other != rank},
            "alpha_pattern": {_exactly(path): other for path, other in alphas.items() if other != alpha},
        }
        facts |= {f"{prefix}.{name}": pattern for name, pattern in patterns.items() if pattern}
        if any(isinstance(update, LoraTensors) and update.magnitude is not None for update in own.values()):
            facts[f"{prefix}.use_dora"] = True
    return json.dumps(facts, sort_keys=True)


def _exactly(path: str) -> str:
    """PEFT takes a plain path for the end of others, too."""
    return f"^{re.escape(path)}"
