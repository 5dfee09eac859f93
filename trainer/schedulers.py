"""Samplers by name: the schedulers of diffusers, made of what a base says of its own noise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.registry import nearest

LATENT = {"clip_sample": False, "thresholding": False}  # latents have no bounds, whatever a class has by default
_KARRAS = {"use_karras_sigmas": True}


class SchedulerError(ValueError):
    """A scheduler that is unknown, or that cannot sample along a base's noise path. One sentence."""


@dataclass(frozen=True)
class Scheduler:
    """One of the table."""

    kind: str  # a class of diffusers
    title: str  # as AUTOMATIC1111 calls its sampler
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    evenly: str = "Automatic"  # as AUTOMATIC1111 calls its schedule


def _both(name: str, kind: str, title: str, options: Mapping[str, Any] | None = None) -> dict[str, Scheduler]:
    """A scheduler with levels as the base spaces them, and with those of arXiv 2206.00364 (Karras)."""
    own = options or {}
    return {
        name: Scheduler(kind, title, own),
        f"{name}_karras": Scheduler(kind, title, {**own, **_KARRAS}, "Karras"),
    }


SCHEDULERS: Mapping[str, Scheduler] = {
    "ddim": Scheduler("DDIMScheduler", "DDIM"),
    "ddpm": Scheduler("DDPMScheduler", "DDPM"),
    "pndm": Scheduler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    **_both("euler", "EulerDiscreteScheduler", "Euler"),
    "euler_a": Scheduler("EulerAncestralDiscreteScheduler", "Euler a"),
    **_both("heun", "HeunDiscreteScheduler", "Heun"),
    **_both("lms", "LMSDiscreteScheduler", "LMS"),
    **_both("dpm2", "KDPM2DiscreteScheduler", "DPM2"),
    **_both("dpm2_a", "KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    **_both("dpm++_2m", "DPMSolverMultistepScheduler", "DPM++ 2M"),
    **_both("dpm++_2m_sde", "DPMSolverMultistepScheduler", "DPM++ 2M SDE", {"algorithm_type": "sde-dpmsolver++"}),
    **_both("unipc", "UniPCMultistepScheduler", "UniPC"),
    **_both("deis", "DEISMultistepScheduler", "DEIS"),
    "lcm": Scheduler("LCMScheduler", "LCM"),
    "tcd": Scheduler("TCDScheduler", "TCD"),
}
_OTHER_WORDS = {"euler_ancestral": "euler_a", "plms": "pndm", "dpm2_ancestral": "dpm2_a", "dpmpp_2m": "dpm++_2m"}


_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_NO_SAMPLE = {
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
}


def known(name: str) -> str:
    """The name in the table that `name` means: case, spaces and dashes do not count (DPM++ 2M Karras).

    Raises:
        SchedulerError: there is none.
    """
    plain = re.sub(r"[\s_-]+", "_", name.strip().lower())
    for other, ours in _OTHER_WORDS.items():
        if plain == other or plain.startswith(f"{other}_"):
            plain = ours + plain.removeprefix(other)
    if plain in SCHEDULERS:
        return plain
    meant = nearest(plain, SCHEDULERS)
    hint = f"; did you mean {meant}?" if meant else ""
    raise SchedulerError(f"scheduler {name!r} is unknown{hint} (allowed: {', '.join(SCHEDULERS)})")


def named(scheduler: Any) -> str:
    """The name in the table of a scheduler of diffusers; its class where the table has none like it."""
    karras = bool(scheduler.config.get("use_karras_sigmas"))
    for name, entry in SCHEDULERS.items():
        options = {**_KARRAS, **entry.options} if karras else entry.options
        same = all(scheduler.config.get(key) == value for key, value in options.items())
        if entry.kind == type(scheduler).__name__ and same and karras == name.endswith("_karras"):
            return name
    return type(scheduler).__name__


def build(own: Any, target: str, name: str | None = None) -> Any:
    """A scheduler along the noise path of the base's `own`, whose model predicts `target`.

    Betas, spacing, offsets and zero terminal SNR (arXiv 2305.08891) stay the base's.

    Args:
        name: of the table [default: the base's own class].

    Raises:
        SchedulerError: it is unknown, or cannot do what this base needs.
    """
    if name is None:
        return type(own).from_config(own.config, prediction_type=target)
    import diffusers  # its schedulers' import costs a second that reading options need not pay

    entry = SCHEDULERS[known(name)]
    kind: Any = getattr(diffusers, entry.kind)
    takes = kind._get_init_keys(kind)
    if own.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in takes:
        able = [n for n, e in SCHEDULERS.items() if "rescale_betas_zero_snr" in _takes(diffusers, e)]
        raise SchedulerError(
            f"the base's noise ends without any picture (zero terminal SNR), where the scheduler {known(name)} cannot "
            f"begin; take {', '.join(able)}"
        )
    if target == "sample" and entry.kind in _NO_SAMPLE:
        raise SchedulerError(f"the base predicts pictures (sample), which the scheduler {known(name)} cannot read")
    config = {key: value for key, value in own.config.items() if key in takes or key.startswith("_")}
    stated = {key: value for key, value in LATENT.items() if key in takes and key not in config}
    spacing = {
        key: False for key in _SIGMAS if key in takes
    }  # the base's own class may have them on; its noise has not
    return kind.from_config(config, **{**stated, **spacing, "prediction_type": target, **entry.options})


def _takes(diffusers: Any, entry: Scheduler) -> set[str]:
    kind: Any = getattr(diffusers, entry.kind)
    return kind._get_init_keys(kind)
