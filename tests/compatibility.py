"""What was checked about which file in which program; `python tests/compatibility.py` writes it into docs/formats.md.

`test_export_matrix.py` has a row for every family and kind here, with these bounds; `test_export_pictures.py` and
`test_export_layouts.py` run what is said to have been run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BASES = {"sd15": "tiny_base", "sd2": "tiny_sd2", "sdxl": "tiny_sdxl"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2, "alpha": 3.0},
    "dora": {"kind": "dora", "rank": 2, "alpha": 3.0},
    "dora-rows": {"kind": "dora", "rank": 2, "alpha": 3.0, "axis": "output"},
    "loha": {"kind": "loha", "rank": 2, "alpha": 3.0},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 3.0},
    "oft": {"kind": "oft", "block": 8},
    "full": {"kind": "full"},
}
TITLES = {
    "lora": "LoRA, LoCon",
    "dora": "DoRA",
    "dora-rows": "DoRA, `axis output`",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "full": "full",
    "rows": "token vectors",
    "model": "whole model",
}
# Worst error of a plain reading of the kohya file, as a share of the largest change of a layer's output.
# Measured: 6e-6, 1e-3 and 8e-3; with DoRA, whose lengths are rounded whole, 1.5e-6, 2e-3 and 1.4e-2.
WORST = {kind: {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1.6e-2} for kind in KINDS}
WORST["dora"] |= {"fp16": 4e-3, "bf16": 3e-2}

# Kinds whose files diffusers, or PEFT, loaded in a test that compares what they compute: by family.
BY_DIFFUSERS = {
    "sd15": ("lora", "dora-rows", "rows", "model"),
    "sd2": ("model",),
    "sdxl": ("lora", "dora-rows", "rows", "model"),
}
BY_PEFT = {"sd15": ("lora", "dora-rows", "loha", "lokr"), "sd2": (), "sdxl": ()}
WINDOWED = ("ComfyUI", "AUTOMATIC1111", "Forge")
PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
START, END = "<!-- compatibility: made by tests/compatibility.py -->\n", "<!-- end of compatibility -->\n"
RULES, RUN, NOT = "rules", "**run**", "–"


def table() -> str:
    """Markdown: a row for each family and kind."""
    lines = [
        "| family | learned | ComfyUI | AUTOMATIC1111 | Forge | diffusers | PEFT |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in BASES:
        for kind, title in TITLES.items():
            windowed = [RULES] * len(WINDOWED)
            if family == "sd2" and kind == "model":
                windowed = ["not tried"] * len(WINDOWED)
            cells = [family, title, *windowed, _diffusers(family, kind), _peft(family, kind)]
            lines.append(f"| {' | '.join(cells)} |")
    worst = ["| learned | fp32 | fp16 | bf16 |", "|---|---|---|---|"]
    worst += [f"| {TITLES[kind]} | {' | '.join(f'{bound:g}' for bound in WORST[kind].values())} |" for kind in KINDS]
    return "\n".join([*lines, "", BOUNDS, "", *worst, ""])


BOUNDS = (
    "A plain reading of the kohya file, written anew in the tests, gives each layer's output with at most this error, "
    "as a share of the largest change of that output:"
)


def _diffusers(family: str, kind: str) -> str:
    if kind in BY_DIFFUSERS[family]:
        return RUN
    return RULES if kind in ("lora", "dora-rows", "rows", "model") else NOT


def _peft(family: str, kind: str) -> str:
    if kind in BY_PEFT[family]:
        return RUN
    return RULES if kind in ("lora", "dora-rows", "loha", "lokr") else NOT


def written(page: str) -> str:
    """The page with the table as it should be."""
    before, rest = page.split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
