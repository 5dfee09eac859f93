"""The cells of the matrix: which parts tests/test_matrix.py trains with which. Writes docs/matrix.md.

python tests/cells.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

# Name -> family, and the fixture of its base.
BASES = {
    "sd15-v": ("sd15", "tiny_base"),
    "sd15-eps": ("sd15", "tiny_base_deep"),
    "sd2": ("sd2", "tiny_sd2"),
    "sdxl": ("sdxl", "tiny_sdxl"),
}
PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bf16", "gradient_checkpointing": True},
    "fp16": {"dtype": "fp16"},
    "int8": {"quantise": "int8"},
}
CONV = "attention+ff+conv"
ADAPTER: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora", "rank": 2, "dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.2}},
    "lora-conv": {"adapter": {"kind": "lora", "rank": 2, "alpha": 1.0, "targets": CONV, "max_norm": 0.1}},
    "rows": {"text": {"tokens": 2}, "triggers": ["TOK", "CAT"]},
    "pivotal": {"adapter": {"kind": "lora", "rank": 2, "dropout": 0.3}, "text": {"tokens": 1}},
    "encoders": {
        "adapter": {"kind": "lora", "rank": 2, "rank_stabilised": True, "text": {"train": True, "targets": "all"}},
        "text": {"tokens": 1},
    },
    "dora": {"adapter": {"kind": "dora", "rank": 2, "dropout": 0.3, "rank_dropout": 0.3, "targets": CONV}},
    "dora-rows": {"adapter": {"kind": "dora", "rank": 2, "axis": "output", "targets": "all", "text": {"train": True}}},
    "loha": {
        "adapter": {
            "kind": "loha",
            "rank": 2,
            "targets": CONV,
            "max_norm": 0.01,
            "rank_dropout": 0.3,
            "text": {"train": True},
        }
    },
    "lokr": {
        "adapter": {
            "kind": "lokr",
            "rank": 2,
            "factor": 4,
            "targets": CONV,
            "l1": 0.1,
            "module_dropout": 0.3,
            "text": {"train": True},
        }
    },
    "oft": {"adapter": {"kind": "oft", "block": 8, "targets": "attention+ff", "text": {"train": True}}},
    "full": {"adapter": {"kind": "full", "targets": "all"}, "text": {"tokens": 1}},
    "norms": {"adapter": {"kind": "full", "targets": "norm", "text": {"train": True, "targets": "norm"}}},
}
SOME: dict[str, dict[str, Any]] = {  # that not every base or optimizer takes
    "lora-plus": {"adapter": {"kind": "lora", "rank": 2, "lora_plus": 16.0, "targets": "attention+ff"}},
    "dora-plus": {"adapter": {"kind": "dora", "rank": 2, "lora_plus": 4.0, "exclude": ["down_blocks"]}},
    "b-lora": {"adapter": {"kind": "lora", "rank": 2, "targets": "b-lora"}, "text": {"tokens": 1}},
    "b-lora-content": {"adapter": {"kind": "lokr", "rank": 2, "targets": "b-lora-content"}},
    "b-lora-style": {"adapter": {"kind": "dora", "rank": 2, "targets": "b-lora-style"}},
}
OBJECTIVE: dict[str, dict[str, Any]] = {
    "denoise": {"kind": "denoise"},
    "denoise-all": {
        "kind": "denoise",
        "min_snr_gamma": 5.0,
        "offset_noise": 0.1,
        "mask_floor": 0.1,
        "t_min": 100,
        "prior_weight": 0.5,
    },
}
EVERYTHING: dict[str, Any] = {  # that can be on at once; with every target
    **OBJECTIVE["denoise-all"],
    "weight": {"kind": "soft_min_snr"},
    "distance": {"kind": "huber", "delta": 0.2, "schedule": "snr"},
    "levels": {"density": "logit_normal", "mean": 0.3, "shift_by": "flux"},
    "noise": {"pyramid": 0.3, "perturbation": 0.1, "condition": 0.05, "gamma": 0.01},
    "mask_prior": 0.5,
}
OPTIMIZER: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {
        "adapter": {"curve": "adaptive", "weight_decay": 0.01},
        "rows": {"curve": "adaptive", "lr": 0.01},
        "text": {"curve": "linear"},
    },
    "prodigy": {
        "adapter": {"name": "prodigy", "lr": 1.0, "curve": "cosine", "warmup": 0.3},
        "rows": {"name": "prodigy", "lr": 1.0, "curve": "restarts", "cycles": 2},
        "text": {"name": "prodigy", "lr": 1.0, "curve": "polynomial", "power": 2.0, "weight_decay": 0.01},
    },
    "averages": {
        "adapter": {"name": "schedulefree-adamw", "lr": 0.01},
        "rows": {"name": "prodigy-plus", "lr": 1.0},
        "text": {"name": "schedulefree-adamw", "lr": 0.01},
    },
    "momentum": {
        "adapter": {"name": "sgd", "lr": 0.1, "curve": "hard_pivot", "options": {"momentum": 0.9}},
        "rows": {"name": "adafactor", "curve": "hard_pivot"},
        "text": {"name": "sgd", "lr": 0.1, "curve": "exponential", "floor": 0.1, "options": {"momentum": 0.9}},
    },
}
TARGETS = ("epsilon", "v_prediction", "sample", "flow_prediction")

Value = tuple[int, str]  # axis, name


def pairs_of(values: Iterable[Value]) -> list[tuple[Value, Value]]:
    return [(one, other) for one, other in combinations(sorted(values), 2) if one[0] != other[0]]


def pairwise(*axes: Iterable[str]) -> list[tuple[str, ...]]:
    """Rows, few of them, so that any two values of different axes meet in one."""
    names = [list(axis) for axis in axes]
    missing = dict.fromkeys(pairs_of((axis, name) for axis, column in enumerate(names) for name in column))
    rows: list[tuple[str, ...]] = []
    while missing:
        row = dict(next(iter(missing)))
        for axis, column in enumerate(names):
            if axis not in row:
                row[axis] = max(
                    column, key=lambda name: sum(p in missing for p in pairs_of([*row.items(), (axis, name)]))
                )
        for pair in pairs_of(row.items()):
            missing.pop(pair, None)
        rows.append(tuple(row[axis] for axis in range(len(names))))
    return rows


AXES = (BASES, ADAPTER, OBJECTIVE, OPTIMIZER)
NARROW = {  # which of their rows are in half precision, which is slow on a CPU, or have rounded weights: only some
    ("sd15-v", "lora"): "bf16",
    ("sd15-v", "oft"): "fp16",
    ("sd15-eps", "norms"): "bf16",
    ("sd15-eps", "rows"): "fp16",
    ("sd2", "pivotal"): "bf16",
    ("sd2", "loha"): "fp16",
    ("sdxl", "rows"): "bf16",
    ("sdxl", "encoders"): "fp16",
    ("sd15-v", "lora-conv"): "int8",
    ("sd15-eps", "dora"): "int8",
    ("sd2", "lokr"): "int8",
    ("sdxl", "pivotal"): "int8",
}
ROWS = [
    *((base, NARROW.get((base, adapter), "fp32"), adapter, *rest) for base, adapter, *rest in pairwise(*AXES)),
    ("sd15-eps", "fp32", "lora-plus", "denoise", "adamw"),
    ("sdxl", "fp32", "lora-plus", "denoise-all", "averages"),
    ("sd2", "fp32", "dora-plus", "denoise", "adamw"),
    ("sdxl", "fp32", "b-lora", "denoise-all", "adamw"),
    ("sdxl", "bf16", "b-lora-content", "denoise", "prodigy"),
    ("sdxl", "fp16", "b-lora-style", "denoise", "averages"),
]
# (base, target): where everything that an objective can do is trained, as "pivotal" with "adamw" in fp32.
EVERY_TARGET = [("sdxl" if target == "epsilon" else "sd15-v", target) for target in TARGETS]


# --- the page

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
HEAD = """\
# What is tested with what

Made by `python tests/cells.py` of the rows that `tests/test_matrix.py` runs; a test fails where the two differ.

Each row is a run of three updates on a tiny random base, and the same run stopped after one, saved and loaded into
parts made anew: losses, all trained tensors, what the optimizers remember and a picture drawn after them are equal to
the last bit, and every component has moved. Not the whole product is run, which grows with every part: any two values
of base, adapter, objective and optimizer meet in a row.
"""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    cells = [list(head), *map(list, rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [*lines[:1], "|" + "---|" * len(cells[0]), *lines[1:]]


def _said(options: Mapping[str, Any]) -> str:
    """Options as a reader of the command line knows them."""
    flat: list[str] = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat += [f"{name}.{rest}" for rest in _said(value).split(", ") if rest]  # pyright: ignore
        else:
            flat.append(f"{name} {json.dumps(value)}".replace('"', ""))
    return ", ".join(flat)


def _axis(title: str, axis: Mapping[str, Any]) -> list[str]:
    rows = [(f"`{name}`", _said(options) or "as it is by default") for name, options in axis.items()]
    return ["", f"## {title}", "", *_table(("name", "what is set"), rows)]


def _crossed() -> list[str]:
    """Adapters against bases: in each cell the rows that have both."""
    lines = []
    for adapter in (*ADAPTER, *SOME):
        cells = [f"`{adapter}`"]
        for base in BASES:
            of = [row for row in ROWS if row[0] == base and row[2] == adapter]
            cells.append("<br>".join(f"{objective}, {opt}, {dtype}" for _, dtype, _, objective, opt in of) or "-")
        lines.append(cells)
    return ["", "## Rows", "", *_table(("adapter", *BASES), lines)]


def _counted() -> list[str]:
    """How many rows have an adapter together with a value of another axis."""
    others = [(axis, name) for axis, of in ((1, PRECISION), (3, OBJECTIVE), (4, OPTIMIZER)) for name in of]
    lines = [
        [f"`{adapter}`", *(str(sum(r[2] == adapter and r[axis] == name for r in ROWS)) for axis, name in others)]
        for adapter in (*ADAPTER, *SOME)
    ]
    note = "How many rows have both:"
    return ["", "## Adapters with the rest", "", note, "", *_table(("adapter", *(name for _, name in others)), lines)]


def page() -> str:
    """The whole of docs/matrix.md."""
    from test_optim import NAMES

    bases = {
        name: {"family": family, "base": f"{fixture} of tests/conftest.py"} for name, (family, fixture) in BASES.items()
    }
    lines = [
        *_crossed(),
        *_counted(),
        *_axis("Bases", bases),
        *_axis("Precision", PRECISION),
        *_axis("Adapters", ADAPTER),
        "",
        "And, as not every base or optimizer takes them:",
        "",
        *_table(("name", "what is set"), [(f"`{name}`", _said(options)) for name, options in SOME.items()]),
        *_axis("Objectives", OBJECTIVE),
        *_axis("Optimizers and curves", OPTIMIZER),
        "",
        "## Targets",
        "",
        "All of this at once, with adapter `pivotal` and optimizer `adamw` in fp32:",
        "",
        f"    {_said(EVERYTHING)}",
        "",
        *_table(("target", "base"), [(f"`{target}`", base) for base, target in EVERY_TARGET]),
        "",
        "## Elsewhere",
        "",
        "- `tests/test_optim.py` has each optimizer alone, which is saved and goes on to the last bit:",
        f"  {', '.join(NAMES)}, and the rest of pytorch-optimizer's names.",
        "- `tests/test_run_adapters.py` has whole runs: half precision, starts, merges, text encoders.",
        "- `tests/objectives/` has each loss weight, distance, density and noise against formulas and schedulers.",
        "- `tests/adapters/` has each kind against its formula, PEFT's layers, and limits, starts and dropouts.",
        "- `tests/test_ranks.py` has two processes against one, to the last bit.",
    ]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    PAGE.write_text(page(), encoding="utf-8")
