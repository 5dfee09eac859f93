"""Peak rates for components that were given none.

They are Adam's on the shipped base (docs/benchmarks.md), times that base's width over the base's: one rate for all
matrices must fall as 1 / width (arXiv 2203.03466; of LoRA's two, arXiv 2402.12354). Token rows follow it as well, which
no paper asks for; it puts them between the rates that other trainers take.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainer.args import ComponentOptim, OptimArgs
from trainer.optim.table import FINDING

PEAKS = {"adapter": 1e-3, "rows": 1e-2, "text": 1e-4}  # of the shipped base
WIDTHS = {"denoiser": 32, "text": 128}  # its own
PARTS = {"adapter": "denoiser", "rows": "text", "text": "text"}  # component -> whose width counts


def filled(args: OptimArgs, widths: Mapping[str, int], pace: float) -> OptimArgs:
    """With a rate for each component that has none, of two digits.

    Args:
        widths: the base's (`ModelFamily.widths`).
        pace: how many times a LoRA's rate the kind of adapter takes.
    """
    sections = {name: section for name, section in args if isinstance(section, ComponentOptim) and section.lr is None}
    rates = {name: _rate(name, section, widths, pace) for name, section in sections.items()}
    return args.model_copy(
        update={name: each.model_copy(update={"lr": rates[name]}) for name, each in sections.items()}
    )


def _rate(component: str, args: ComponentOptim, widths: Mapping[str, int], pace: float) -> float:
    if args.name in FINDING:
        return 1.0
    part = PARTS[component]
    own = PEAKS[component] * WIDTHS[part] / widths[part] * (1.0 if component == "rows" else pace)
    return float(f"{own:.2g}")
