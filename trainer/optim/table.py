"""The optimizers: names -> classes, with the settings that each of them takes.

Torch's own and prodigyopt are always there. The rest are extras (trainer.extras): schedulefree, bitsandbytes,
prodigy-plus-schedule-free, and pytorch-optimizer with a catalogue of its own, of which every name works that is not
refused below. `package.module:attr` and `file.py:attr` name a factory: (params, lr, **options) -> Optimizer.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from trainer import registry
from trainer.args import ComponentOptim, OptimArgs, RuleArgs
from trainer.extras import needed
from trainer.optim.updates import HasAverages

log = logging.getLogger(__name__)

_TORCH = {
    "adamw": "torch.optim:AdamW",
    "adam": "torch.optim:Adam",
    "sgd": "torch.optim:SGD",
    "rmsprop": "torch.optim:RMSprop",
    "adagrad": "torch.optim:Adagrad",
    "adadelta": "torch.optim:Adadelta",
    "adamax": "torch.optim:Adamax",
    "nadam": "torch.optim:NAdam",
    "radam": "torch.optim:RAdam",
    "adafactor": "torch.optim:Adafactor",
    "muon": "torch.optim:Muon",
}
_FUSED = ("adamw", "adam")  # with one operator for a whole update, also on CPUs
_EIGHT_BIT = ("AdEMAMix", "Adagrad", "Adam", "AdamW", "Lion", "RMSprop", "SGD")
_PAGED = ("AdEMAMix", "Adam", "AdamW", "Lion")

OPTIMIZERS: dict[str, str] = {
    **_TORCH,
    "prodigy": "prodigyopt:Prodigy",  # arXiv 2306.06101
    "prodigy-plus": "prodigyplus.prodigy_plus_schedulefree:ProdigyPlusScheduleFree",
    "schedulefree-adamw": "schedulefree:AdamWScheduleFree",  # arXiv 2405.15682
    "schedulefree-radam": "schedulefree:RAdamScheduleFree",
    "schedulefree-sgd": "schedulefree:SGDScheduleFree",
    **{f"{name.lower()}8bit": f"bitsandbytes.optim:{name}8bit" for name in _EIGHT_BIT},
    **{f"paged{name.lower()}8bit": f"bitsandbytes.optim:Paged{name}8bit" for name in _PAGED},
}
_EXTRA = {
    "schedulefree": "schedulefree",
    "prodigyplus": "prodigy-plus",
    "bitsandbytes": "bitsandbytes",
    "pytorch_optimizer": "optimizers",
}

_SECOND_ORDER = "it differentiates gradients, and the graph of a backward is gone by then"
_WHOLE_MODEL = "it wants the whole model in place of the parameters that are trained"
_CLOSURE = "it computes the loss again within its step, which here has drawn its noise"
_SORTED = "its matrices and its other tensors must be told apart by hand; muon trains matrices"
_ZERO = "a tensor that starts at 0, as half of every low-rank update does, would stay there"
_STATE = "what it remembers cannot be put into a checkpoint, so no run could be resumed"
REFUSED: dict[str, str] = {
    "adahessian": _SECOND_ORDER,
    "sophiah": _SECOND_ORDER,
    "adalomo": _WHOLE_MODEL,
    "lomo": _WHOLE_MODEL,
    "adammini": _WHOLE_MODEL,
    "alig": _CLOSURE,
    "bsam": _CLOSURE,
    "lbfgs": _CLOSURE,
    "rprop": "its step sizes are its own after the first step, so no learning rate would act",
    "sparseadam": "gradients are dense here",
    "asgd": "its rate falls by a rule of its own; adagrad and schedulefree-sgd are near it",
    "adago": _SORTED,
    "adamuon": _SORTED,
    "distributedmuon": _SORTED,
    "muonclip": _SORTED,
    "normuon": _SORTED,
    "lamb8bit": _ZERO,
    "lars8bit": _ZERO,
    "a2grad": "it has no learning rate",
    "dadaptsgd": _ZERO,
    "adashift": _STATE,
    "conda": _STATE,
    "kron": _STATE,
    "rose": _STATE,
    "scalableshampoo": _STATE,
    "demo": "it exchanges gradients between processes by itself",
    "ftrl": "it moves parameters that have no gradient, and away from what they were",
    "lorarite": "it must know which A goes with which B",
    "sara": "it trains the numbers that are nearly 0 at the start alone, of some tensors none",
    "magma": "its implementation cannot take parameters by name",
}
MATRICES = ("muon", "spectralsphere")  # train tensors of two dimensions only
ONE_RATE = ("prodigy", "dadaptadagrad", "dadaptadam", "dadaptadan", "dadaptlion")  # or 0, in each group
FINDING = (*ONE_RATE, "prodigy-plus")  # find a rate, which `lr` multiplies
_BETAS = (0.9, 0.99)  # of torch's own and prodigy; extras have their own
_OURS = ("lr", "betas", "eps", "weight_decay")
# Prodigy: safeguard_warmup leaves the rate out of the estimate's denominator, which keeps d sound while a curve rises.
_DEFAULTS: dict[str, dict[str, Any]] = {"prodigy": {"use_bias_correction": True, "safeguard_warmup": True}}


def check(optim: OptimArgs, *, code: bool = True) -> None:
    """Finds every component's optimizer and curve, and what they would be made with, before anything is loaded.

    Raises:
        PartError: no optimizer has this name, it needs a package that is not there, or it has no such setting; or a
            spec would import code, and `code` is False.
    """
    for rule in optim.rules:
        if ":" in rule.curve:
            registry.load({}, rule.curve, f"optim.rules {rule.match!r}.curve", code=code)
    for component in type(optim).model_fields:
        section = getattr(optim, component)
        if isinstance(section, ComponentOptim):
            where = f"optim.{component}"
            any_rate = section.model_copy(update={"lr": section.lr or 1.0})  # the base says which, later
            _settings(any_rate, _factory(section.name, where, code=code), where)
            if ":" in section.curve:
                registry.load({}, section.curve, f"{where}.curve", code=code)


def averages(args: ComponentOptim, where: str) -> bool:
    """Whether its optimizer averages, in place of a rate that falls."""
    factory = _factory(args.name, where, code=True)
    return isinstance(factory, type) and issubclass(factory, HasAverages)


def make(args: ComponentOptim, groups: list[dict[str, Any]], rules: Sequence[RuleArgs], *, where: str) -> Optimizer:
    """The optimizer of these groups, ready to train.

    Raises:
        ValueError: as `check`; or these tensors or these rates are not for this optimizer.
    """
    factory = _factory(args.name, where, code=True)
    settings = _settings(args, factory, where)
    _check_fits(args, groups, rules, where)
    if args.name == "prodigy-plus" and len(groups) == 1:
        settings.setdefault("split_groups", False)  # else it says by print that there is nothing to split
    if args.name in _FUSED and not {*settings} & {"foreach", "differentiable"} and _on_cpu(groups):
        settings.setdefault("fused", True)  # a seventh of the time for many small tensors; on GPUs torch chooses well
    decay = settings.pop("weight_decay", None) if args.name == "prodigy" else None  # its constructor prints
    try:
        optimizer: Any = factory(groups, **settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise registry.PartError(f"{where}: {args.name} cannot be made with {settings}: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise registry.PartError(f"{where}.name {args.name!r} gave a {type(optimizer).__name__}, not an Optimizer")
    for group, given in zip(optimizer.param_groups, groups, strict=True):
        group |= {"scale": given["scale"], "rule": given["rule"]}
        if decay is not None:
            group["weight_decay"] = decay
    if isinstance(optimizer, HasAverages):
        optimizer.train()
    return optimizer


def _on_cpu(groups: Sequence[Mapping[str, Any]]) -> bool:
    return all(parameter.device.type == "cpu" for group in groups for _, parameter in group["params"])


def _factory(name: str, where: str, *, code: bool) -> Any:
    if ":" in name:
        return registry.load(OPTIMIZERS, name, f"{where}.name", code=code)
    if name in REFUSED:
        raise registry.PartError(f"{where}.name {name!r} cannot train here: {REFUSED[name]}")
    if name in OPTIMIZERS:
        package = OPTIMIZERS[name].partition(":")[0].partition(".")[0]
        if package in _EXTRA and importlib.util.find_spec(package) is None:
            raise registry.PartError(f"{where}.name is {name!r}, {needed(_EXTRA[package])}")
        return registry.load(OPTIMIZERS, name, f"{where}.name")
    catalogue = _catalogue()
    if name in catalogue:
        return catalogue[name]
    meant = registry.nearest(name, [*OPTIMIZERS, *catalogue, *REFUSED])
    hint = f"; did you mean {meant}?" if meant else ""
    more = "and those of pytorch-optimizer" if catalogue else f"and a hundred more, {needed('optimizers')}"
    raise registry.PartError(f"{where}.name {name!r} is unknown{hint} (allowed: {', '.join(OPTIMIZERS)}, {more})")


def _catalogue() -> Mapping[str, Any]:
    """pytorch-optimizer's own, by name; empty where it is not installed."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return {}
    library: Any = importlib.import_module("pytorch_optimizer")
    names: Iterable[str] = library.get_supported_optimizers()
    return {name: library.load_optimizer(name) for name in names if name not in REFUSED}


def _settings(args: ComponentOptim, factory: Any, where: str) -> dict[str, Any]:
    """What the factory is called with besides the parameters."""
    takes = inspect.signature(factory).parameters
    anything = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    own = [name for name, each in takes.items() if name != "params" and each.kind is not each.VAR_KEYWORD]
    settings: dict[str, Any] = {"lr": args.peak, **_DEFAULTS.get(args.name, {})}
    betas = args.betas or (_BETAS if args.name in _TORCH or args.name == "prodigy" else ())
    given = {
        "betas": (betas or None, bool(args.betas)),
        "eps": (args.eps, args.eps is not None),
        "weight_decay": (args.weight_decay, args.weight_decay != 0),
    }
    for name, (value, wanted) in given.items():
        if name in own or (anything and wanted):
            settings |= {} if value is None else {name: value}
        elif wanted:
            raise registry.PartError(f"{where}.{name} is {value}, but {args.name} has no {name}{_has(own)}")
    _check_betas(args, takes, where)
    for name, value in args.options.items():
        if name in _OURS:
            raise registry.PartError(f"{where}.options has {name}, which is an option of its own: {where}.{name}")
        if name not in own and not anything:
            meant = registry.nearest(name, own)
            hint = f"; did you mean {meant}?" if meant else ""
            raise registry.PartError(f"{where}.options has {name}, which {args.name} has not{hint}{_has(own)}")
        settings[name] = tuple(value) if isinstance(value, list) else value
    missing = [name for name in own if takes[name].default is inspect.Parameter.empty and name not in settings]
    if missing:
        raise registry.PartError(f"{where}.options lacks {', '.join(missing)}, which {args.name} needs")
    return settings


def _has(own: Sequence[str]) -> str:
    rest = [name for name in own if name not in _OURS]
    return f" (it has {', '.join(rest)})" if rest else ""


def _check_betas(args: ComponentOptim, takes: Mapping[str, inspect.Parameter], where: str) -> None:
    default = takes["betas"].default if "betas" in takes else None
    if args.betas and isinstance(default, tuple) and len(args.betas) != len(default):
        raise registry.PartError(
            f"{where}.betas has {len(args.betas)} numbers, but {args.name} takes {len(default)}, by default {default}"
        )


def _check_fits(
    args: ComponentOptim, groups: Sequence[Mapping[str, Any]], rules: Sequence[RuleArgs], where: str
) -> None:
    """Refuses rates and tensors that this optimizer cannot train."""
    scales = sorted({group["scale"] for group in groups})
    if args.name in ONE_RATE and (len(scales) > 1 or any(rule.curve for rule in rules)):
        raise ValueError(
            f"{where}: {args.name} finds one rate for all parameters, but they should learn at several (times "
            f"{', '.join(f'{scale:g}' for scale in scales)}); take another optimizer, or leave lr_scale, curve and the "
            "adapter's ratio as they are"
        )
    if args.name in MATRICES:
        odd = [name for group in groups for name, parameter in group["params"] if parameter.ndim != 2]
        if odd:
            raise ValueError(
                f"{where}: {args.name} trains matrices alone, and of {len(odd)} tensors such as {odd[0]} it can make "
                "nothing; take another optimizer, or targets without convolutions"
            )
    if args.name in FINDING and args.peak < 0.1:
        log.warning(
            "%s multiplies the rate that it finds by lr, and lr is %g: training will be slow; give 1",
            args.name,
            args.peak,
        )
