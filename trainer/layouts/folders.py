"""Updates as the folders that PEFT loads: `adapter_model.safetensors` and `adapter_config.json` for each component."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer.layouts.container import LayoutError
from trainer.layouts.write import Modules, commonest, lora_config, others, peft_lora
from trainer.types import ClientNames
from trainer.updates import LohaTensors, LokrTensors, LoraTensors, Update

PREFIX = "base_model.model"


def peft_folders(modules: Modules, clients: ClientNames) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Name of the part in a pipeline ("unet", "text_encoder") -> its tensors, and the text of its config.

    Names inside are the paths of the live modules, as PeftModel wants them; a text encoder's are thus those of the
    installed version of transformers.

    Raises:
        LayoutError: what `cannot_say` says, or updates of several kinds, of which a folder holds one.
    """
    folders: dict[str, tuple[dict[str, Tensor], str]] = {}
    for component in dict.fromkeys(component for component, _ in modules):
        own = {path: update for (c, path), update in modules.items() if c == component}
        part = clients.diffusers(component, "").split(".")[0]
        folders[part] = _state(own), json.dumps(_config(own), indent=2, sort_keys=True) + "\n"
    return folders


def _state(own: Mapping[str, Update]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path, update in own.items():
        if isinstance(update, LoraTensors):
            ends = peft_lora(update)
        elif isinstance(update, LohaTensors):
            ends = {f"hada_{name}": getattr(update, name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
        elif isinstance(update, LokrTensors):
            ends = {**_named("lokr_w1", update.w1), **_named("lokr_w2", update.w2)}
        else:
            raise LayoutError("PEFT has no folders of differences of weights")
        state |= {f"{PREFIX}.{path}.{end}": tensor for end, tensor in ends.items()}
    return state


def _named(name: str, factors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {name: factors[0]} if len(factors) == 1 else {f"{name}_a": factors[0], f"{name}_b": factors[1]}


def _config(own: Mapping[str, Update]) -> dict[str, Any]:
    """What PeftConfig.from_pretrained reads; options that are left out have PEFT's defaults."""
    kinds = {type(update) for update in own.values()}
    if len(kinds) > 1:
        raise LayoutError("a folder of PEFT holds updates of one kind, and these are of several")
    if kinds == {LoraTensors}:
        return {"peft_type": "LORA", "inference_mode": True, **lora_config(own)}
    return {
        "inference_mode": True,
        "target_modules": sorted(own),
        **(_loha(own) if kinds == {LohaTensors} else _lokr(own)),
    }


def _loha(own: Mapping[str, Update]) -> dict[str, Any]:
    ranks = {path: update.w1_b.shape[0] for path, update in own.items() if isinstance(update, LohaTensors)}
    alphas = {path: update.alpha for path, update in own.items() if isinstance(update, LohaTensors)}
    return {"peft_type": "LOHA", **_ranked(ranks, alphas)}


def _lokr(own: Mapping[str, Update]) -> dict[str, Any]:
    """PEFT keeps the larger matrix whole from a rank of half its side on, so that a whole one's rank is not known."""
    updates = {path: update for path, update in own.items() if isinstance(update, LokrTensors)}
    ranks = {path: _rank(update) for path, update in updates.items()}
    alphas = {path: update.scale * ranks[path] for path, update in updates.items()}
    return {"peft_type": "LOKR", "decompose_factor": _factor(updates), **_ranked(ranks, alphas)}


def _rank(update: LokrTensors) -> int:
    pairs = [factors for factors in (update.w2, update.w1) if len(factors) == 2]
    return pairs[0][1].shape[0] if pairs else max(update.w2[0].shape[:2])


def _factor(updates: Mapping[str, LokrTensors]) -> int:
    """The option by which PEFT splits all these layers as they were split.

    Raises:
        LayoutError: there is none.
    """
    from peft.tuners.lokr.layer import factorization

    splits = {split for update in updates.values() for split in _splits(update)}
    for factor in (-1, *sorted({small for small, _ in splits})):
        if all(any(factorization(small * n, factor) == (small, n) for n in larger) for small, larger in splits):
            return factor
    raise LayoutError("no decompose_factor of PEFT splits the layers of this LoKr as they are split")


def _splits(update: LokrTensors) -> list[tuple[int, tuple[int, ...]]]:
    """Outputs and inputs of the smaller matrix, each with what those of the larger can be.

    A kernel is not told apart from the inputs of a factored one: it may be of one pixel or of 3 x 3.
    """
    if len(update.w1) == 2:
        raise LayoutError("the smaller matrix of a LoKr is factored, which PEFT does only where it is told to")
    (o1, i1), o2 = update.w1[0].shape, update.w2[0].shape[0]
    if len(update.w2) == 1:
        return [(o1, (o2,)), (i1, (update.w2[0].shape[1],))]
    inputs = update.w2[1].shape[1]
    return [(o1, (o2,)), (i1, tuple(inputs // kernel for kernel in (1, 9) if inputs % kernel == 0))]


def _ranked(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    rank, alpha = commonest(ranks), commonest(alphas)
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": others(ranks, rank),
        "alpha_pattern": others(alphas, alpha),
    }
