"""Layer rules: which trained tensor obeys which rule of optim.rules, by a pattern over names."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from trainer.args import RuleArgs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Components = Mapping[str, Sequence[tuple[str, nn.Parameter]]]


def assigned(rules: Sequence[RuleArgs], components: Components) -> dict[str, dict[str, RuleArgs]]:
    """Component -> name of a parameter -> the rule that it obeys: the first that matches. Others are not in it.

    Raises:
        ValueError: a rule matches no parameter, or none that an earlier rule has left. The message has near names.
    """
    found: dict[str, dict[str, RuleArgs]] = {component: {} for component in components}
    for rule in rules:
        pattern = compiled(rule.match)
        of = [
            (component, name)
            for component, named in components.items()
            for name, _ in named
            if any(pattern.fullmatch(path) for path in _paths(name))
        ]
        if not of:
            names = [name for named in components.values() for name, _ in named]
            raise ValueError(
                f"optim.rules: {rule.match!r} matches nothing that is trained; {_near(rule.match, names)}. Write it as "
                "they are named here, or leave the rule out"
            )
        new = [(component, name) for component, name in of if name not in found[component]]
        if not new:
            raise ValueError(
                f"optim.rules: all {len(of)} tensors that {rule.match!r} matches obey an earlier rule; put it before "
                "that, or leave it out"
            )
        for component, name in new:
            found[component][name] = rule
    return found


@torch.no_grad()
def cast(found: Mapping[str, Mapping[str, RuleArgs]], components: Components) -> None:
    """Gives tensors the precision that their rule names; before an optimizer is made of them.

    Raises:
        ValueError: a rule names one half of a low-rank update, whose halves are multiplied with one another.
    """
    for component, named in components.items():
        of = {name: found[component][name].dtype if name in found[component] else "keep" for name, _ in named}
        halves: dict[str, tuple[str, str]] = {}
        for name, parameter in named:
            layer = name.partition(".lora_")[0]
            other, dtype = halves.setdefault(layer, (name, of[name]))
            if ".lora_" in name and dtype != of[name]:
                raise ValueError(
                    f"optim.rules trains {name} in {of[name]} and {other} in {dtype}, but they are multiplied with "
                    f"each other; match the layer {layer}"
                )
            if of[name] != "keep":
                parameter.data = parameter.data.to(DTYPES[of[name]])


def compiled(match: str) -> re.Pattern[str]:
    """A glob, whose * matches dots too, or a regular expression after "re:"; either must match a whole path."""
    return re.compile(match.removeprefix("re:") if match.startswith("re:") else fnmatch.translate(match))


def described(rules: Sequence[RuleArgs], found: Mapping[str, Mapping[str, RuleArgs]]) -> list[str]:
    """A line for each rule: what it does, and to which tensors."""
    lines: list[str] = []
    for rule in rules:
        names = [name for of in found.values() for name, obeyed in of.items() if obeyed is rule]
        does = [f"rate times {rule.lr_scale:g}"] if rule.lr_scale != 1 else []
        does += [f"curve {rule.curve}"] if rule.curve else []
        window = (rule.after, rule.until) != (0.0, 1.0)
        does += (
            [f"trained from {rule.after:.0%} to {rule.until:.0%} of the run, frozen before and after"] if window else []
        )
        does += [f"trained in {rule.dtype}"] if rule.dtype != "keep" else []
        does += [f"what the optimizer remembers waits on the {rule.device}"] if rule.device != "keep" else []
        lines.append(f"rule {rule.match}: {', '.join(does)}: {len(names)} tensors: {', '.join(names)}")
    return lines


def _paths(name: str) -> Iterator[str]:
    """The parameter's own name, and those of the modules that it is in: a.b.weight, a.b, a."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])


def _near(match: str, names: Sequence[str]) -> str:
    """Names of layers that look like the pattern's longest word, as they are written here."""
    word = max(re.findall(r"[\w.]+", match.removeprefix("re:").replace("\\.", ".")) or [""], key=len).strip(".")
    length = word.count(".") + 1
    parts = [name.split(".") for name in names]
    seen = {".".join(of[i : i + length]) for of in parts for i in range(len(of) - length + 1)}
    near = difflib.get_close_matches(word, sorted(seen), n=4, cutoff=0.5)
    return f"near are {', '.join(near)}" if near else f"there are {', '.join(names[:4])} and {len(names)} in all"
