"""Which layers an adapter acts on, and the rank and alpha of each: presets, patterns, and what is wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from trainer.args import AdapterArgs
from trainer.types import BaseModelError

ATTENTION = r".*\.attn\d*\.(to_q|to_k|to_v|to_out\.0)"
FEED_FORWARD = r".*\.ff\.net\.(0\.proj|2)"
CONVOLUTION = (
    r".*\.(resnets\.\d+\.(conv1|conv2|conv_shortcut)|downsamplers\.0\.conv|upsamplers\.0\.conv|proj_in|proj_out)"
)
TEXT_ATTENTION = r".*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
TEXT_FEED_FORWARD = r".*\.mlp\.(fc1|fc2)"
BLOCK = r"up_blocks\.0\.attentions\.{}\..*\.attn\d*\.(to_q|to_k|to_v|to_out\.0)"
# part -> preset -> what it is made of, each of which must be there. B-LoRA: arXiv 2403.14572, on SDXL.
PRESETS: dict[str, dict[str, dict[str, str]]] = {
    "denoiser": {
        "attention": {"attention": ATTENTION},
        "attention+ff": {"attention": ATTENTION, "ff": FEED_FORWARD},
        "attention+ff+conv": {"attention": ATTENTION, "ff": FEED_FORWARD, "conv": CONVOLUTION},
        "b-lora": {"content (up_blocks.0.attentions.0)": BLOCK.format(0), "style (.1)": BLOCK.format(1)},
        "b-lora-content": {"content (up_blocks.0.attentions.0)": BLOCK.format(0)},
        "b-lora-style": {"style (up_blocks.0.attentions.1)": BLOCK.format(1)},
    },
    "text": {
        "attention": {"attention": TEXT_ATTENTION},
        "attention+ff": {"attention": TEXT_ATTENTION, "ff": TEXT_FEED_FORWARD},
    },
}
MATRICES = (nn.Linear, nn.Conv2d)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_Value = TypeVar("_Value", int, float)


@dataclass(frozen=True)
class Target:
    """A layer, with the rank and alpha of its update (where the kind has them)."""

    path: str
    rank: int
    alpha: float


def choose(
    root: nn.Module, args: AdapterArgs, part: str, *, takes: tuple[type[nn.Module], ...], ranked: bool
) -> list[Target]:
    """The layers that `args` names in `root`, in its order.

    Args:
        part: "denoiser" or "text": which presets hold.
        takes: the kinds of layers that the adapter can change.
        ranked: whether ranks count, and must fit the layers' widths.

    Raises:
        BaseModelError: there are no such layers, or a pattern matches none, or a rank or a layer does not fit.
    """
    layers = {path: module for path, module in root.named_modules() if _trainable(module)}
    layers.pop("text_projection", None)  # of a text encoder: no file layout has a name for it that clients share
    chosen = _named(layers, args, part)
    for pattern in args.exclude:
        kept = [path for path in chosen if not re.search(pattern, path)]
        if len(kept) == len(chosen):
            raise _nothing("adapter.exclude", pattern, chosen)
        chosen = kept
    if not chosen:
        raise BaseModelError("adapter.exclude leaves no layer to train; leave some of its patterns out")
    wrong = [path for path in chosen if not isinstance(layers[path], takes)]
    if wrong:
        kinds = ", ".join(sorted({type(layers[path]).__name__ for path in wrong}))
        able = " and ".join(kind.__name__ for kind in takes)
        raise BaseModelError(
            f"adapter.kind {args.kind} changes {able} layers, and {len(wrong)} of those chosen are {kinds} "
            f"({_few(wrong)}); take other adapter.targets, exclude them, or take kind {_other_kind(layers, wrong)}"
        )
    ranks = _by_pattern("adapter.ranks", args.ranks, chosen)
    alphas = _by_pattern("adapter.alphas", args.alphas, chosen)
    targets: list[Target] = []
    for path in chosen:
        rank = ranks.get(path, args.rank)
        if args.targets == "all" and not args.match and path not in ranks:
            rank = min(rank, _width(layers[path]))  # of the ends, which are as narrow as a picture's channels
        alpha = alphas.get(path, float(rank) if args.alpha is None else args.alpha)
        targets.append(Target(path, rank, alpha))
    if ranked:
        _check_ranks(layers, targets, part)
    return targets


def _trainable(module: nn.Module) -> bool:
    return isinstance(module, MATRICES) or (
        isinstance(module, NORMS) and "weight" in dict(module.named_parameters(recurse=False))
    )


def _named(layers: Mapping[str, nn.Module], args: AdapterArgs, part: str) -> list[str]:
    """Those of adapter.match, or of the preset."""
    if args.match:
        for pattern in args.match:
            if not any(re.search(pattern, path) for path in layers):
                raise _nothing("adapter.match", pattern, list(layers))
        return [path for path in layers if any(re.search(pattern, path) for pattern in args.match)]
    if args.targets in ("all", "norm"):
        kinds = MATRICES if args.targets == "all" else NORMS
        found = [path for path, module in layers.items() if isinstance(module, kinds)]
        if not found:
            raise BaseModelError(f"adapter.targets is {args.targets}, but this {_called(part)} has no such layers")
        return found
    if args.targets not in PRESETS[part]:
        allowed = ", ".join([*PRESETS[part], "all", "norm"])
        raise BaseModelError(f"targets is {args.targets}, which a {_called(part)} has not; take one of {allowed}")
    kinds_of_preset = {name: re.compile(pattern) for name, pattern in PRESETS[part][args.targets].items()}
    matrices = [path for path, module in layers.items() if isinstance(module, MATRICES)]
    for name, kind in kinds_of_preset.items():
        if not any(kind.fullmatch(path) for path in matrices):
            raise BaseModelError(f"adapter.targets is {args.targets}, but this {_called(part)} has no {name} layers")
    return [path for path in matrices if any(kind.fullmatch(path) for kind in kinds_of_preset.values())]


def _called(part: str) -> str:
    return "denoiser" if part == "denoiser" else "text encoder"


def _by_pattern(option: str, values: Mapping[str, _Value], chosen: Sequence[str]) -> dict[str, _Value]:
    """Path -> value of the first pattern that is found in it."""
    found: dict[str, _Value] = {}
    for pattern, value in values.items():
        own = [path for path in chosen if re.search(pattern, path)]
        if not own:
            raise _nothing(option, pattern, chosen)
        for path in own:
            found.setdefault(path, value)
    return found


def _check_ranks(layers: Mapping[str, nn.Module], targets: Sequence[Target], part: str) -> None:
    above = [target for target in targets if target.rank > _width(layers[target.path])]
    if above:
        first = ", ".join(f"{t.path} (rank {t.rank}, at most {_width(layers[t.path])})" for t in above[:3])
        more = f" and {len(above) - 3} more" if len(above) > 3 else ""
        own = "lower adapter.rank, or give these layers a rank of their own in adapter.ranks"
        to_do = own if part == "denoiser" else "give a lower adapter.text.rank"
        raise BaseModelError(f"the rank is above the layer's width in {first}{more}; {to_do}")


def _width(layer: nn.Module) -> int:
    """The rank that its weight can have."""
    assert isinstance(layer, MATRICES)
    return min(layer.weight.shape[0], layer.weight[0].numel())


def _other_kind(layers: Mapping[str, nn.Module], wrong: Sequence[str]) -> str:
    return "full" if any(isinstance(layers[path], NORMS) for path in wrong) else "lora"


def _nothing(option: str, pattern: str, paths: Sequence[str]) -> BaseModelError:
    plain = re.sub(r"\\?\.[*+?]?|[\^$()\[\]|*+?\\]", ".", pattern).strip(".")
    alike = [path for path in paths if plain.rpartition(".")[2] in path] or paths
    near = difflib.get_close_matches(plain, alike, n=3, cutoff=0.3)
    there = f"near it are {', '.join(near)}" if near else f"there are {_few(paths)}"
    return BaseModelError(
        f"{option} {pattern!r} matches no layer; {there}. Write it as layers are named here, or leave it out"
    )


def _few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
