"""Updates as the kohya, the comfy and the diffusers layout spell them, and what of them each layout cannot say."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from trainer.args import Layout
from trainer.layouts.container import LayoutError
from trainer.types import ClientNames
from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, Update

Value = TypeVar("Value", int, float)
Modules = Mapping[tuple[str, str], Update]  # (component, module path) -> its update


def kohya_state(modules: Modules, clients: ClientNames) -> dict[str, Tensor]:
    """`<kohya name>.lora_down.weight`, `.alpha` (0-d), ... for each module, as ComfyUI, Forge and A1111 read them.

    Raises:
        LayoutError: two modules share a name, or lengths are of rows, which clients do not read alike.
    """
    return _state(modules, clients.kohya, "kohya")


def comfy_state(modules: Modules, clients: ClientNames) -> dict[str, Tensor]:
    """The same tensors under the names of ComfyUI's own modules; A1111 does not read them.

    Raises:
        LayoutError: as `kohya_state`, or these names are not known for the family.
    """
    if clients.comfy is None:
        raise LayoutError("ComfyUI's own names are not known for this family")
    return _state(modules, clients.comfy, "comfy")


def _state(modules: Modules, spelled: Callable[[str, str], str], layout: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    names = {key: spelled(*key) for key in modules}
    if len(set(names.values())) < len(names):
        raise LayoutError(f"two modules share one {layout} name; this base cannot be written in the {layout} layout")
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
            if by_rows(update):
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


def by_rows(update: Update) -> bool:
    """Whether it is DoRA with lengths of rows, [o, 1(, 1, 1)], not of columns, [1, i(, 1, 1)]."""
    return isinstance(update, LoraTensors) and update.magnitude is not None and update.magnitude.shape[0] != 1


def cannot_say(layout: Layout, modules: Modules, clients: ClientNames) -> dict[str, list[str]]:
    """What of the updates a layout has no words for -> the layers of that; empty if all fits."""
    lacks: dict[str, list[str]] = {}
    for (component, path), update in modules.items():
        reason = _reason(layout, component, update, clients)
        if reason:
            lacks.setdefault(reason, []).append(f"{component} {path}")
    return lacks


def _reason(layout: Layout, component: str, update: Update, clients: ClientNames) -> str | None:
    if layout == "comfy" and clients.comfy is None:
        return "anything of this family, whose names in ComfyUI are not known here"
    if layout not in ("diffusers", "peft"):
        return None
    if isinstance(update, Difference):
        return "differences of weights"
    if layout == "diffusers" and isinstance(update, LohaTensors | LokrTensors):
        return "LoHa" if isinstance(update, LohaTensors) else "LoKr"
    if isinstance(update, LoraTensors) and update.magnitude is not None:
        if not by_rows(update):
            return "DoRA over the input axis"
        if layout == "diffusers" and component != "denoiser":
            return "DoRA of text encoders, whose lengths diffusers leaves out on loading"
    return None


def diffusers_state(modules: Modules, clients: ClientNames) -> dict[str, Tensor]:
    """`unet.<path>.lora_A.weight`, `.lora_B.weight` and, for DoRA, `.lora_magnitude_vector` in PEFT's shape.

    Raises:
        LayoutError: what `cannot_say` says.
    """
    lacks = cannot_say("diffusers", modules, clients)
    if lacks:
        raise LayoutError(f"the diffusers layout cannot say {', '.join(lacks)}")
    state: dict[str, Tensor] = {}
    for (component, path), update in modules.items():
        assert isinstance(update, LoraTensors)
        state |= {f"{clients.diffusers(component, path)}.{end}": tensor for end, tensor in peft_lora(update).items()}
    return state


def peft_lora(update: LoraTensors) -> dict[str, Tensor]:
    """PEFT's ends of a LoRA's or DoRA's names; lengths are flat for Linear layers, [1, o, 1, 1] for convolutions."""
    ends = {"lora_A.weight": update.down, "lora_B.weight": update.up}
    if update.magnitude is not None:
        lengths = update.magnitude.flatten()
        ends["lora_magnitude_vector"] = lengths.reshape(1, -1, 1, 1) if update.magnitude.ndim == 4 else lengths
    return ends


def diffusers_metadata(modules: Modules, clients: ClientNames) -> str:
    """JSON of the LoraConfig arguments by component: in this layout it is what carries alpha."""
    facts: dict[str, object] = {}
    for component in dict.fromkeys(component for component, _ in modules):
        own = {path: update for (c, path), update in modules.items() if c == component}
        prefix = clients.diffusers(component, "").split(".")[0]
        facts |= {f"{prefix}.{name}": value for name, value in lora_config(own).items()}
    return json.dumps(facts, sort_keys=True)


def lora_config(own: Mapping[str, Update]) -> dict[str, object]:
    """The arguments of PEFT's LoraConfig for the updates of one component, by path."""
    ranks = {path: update.down.shape[0] for path, update in own.items() if isinstance(update, LoraTensors)}
    alphas = {path: update.alpha for path, update in own.items() if isinstance(update, LoraTensors)}
    rank, alpha = commonest(ranks), commonest(alphas)
    facts: dict[str, object] = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(own)}
    patterns = {"rank_pattern": others(ranks, rank), "alpha_pattern": others(alphas, alpha)}
    facts |= {name: pattern for name, pattern in patterns.items() if pattern}
    if any(isinstance(update, LoraTensors) and update.magnitude is not None for update in own.values()):
        facts["use_dora"] = True
    return facts


def commonest(values: Mapping[str, Value]) -> Value:
    """The value that most paths have."""
    return Counter(values.values()).most_common(1)[0][0]


def others(values: Mapping[str, Value], usual: Value) -> dict[str, Value]:
    """PEFT's pattern of the paths with another value. It takes a plain path for the end of others, too."""
    return {f"^{re.escape(path)}": value for path, value in values.items() if value != usual}
