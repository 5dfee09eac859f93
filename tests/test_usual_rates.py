"""Peak learning rates where none is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.concepts import write_zip
from trainer import cli
from trainer.__main__ import main
from trainer.args import ModelArgs, OptimArgs
from trainer.models.sd15 import SD15
from trainer.models.sdxl import SDXL
from trainer.models.skeleton import PUBLISHED
from trainer.optim.usual import filled

SD15_WIDTHS = {"denoiser": 320, "text": 768}
SDXL_WIDTHS = {"denoiser": 320, "text": 1280}


def peaks(widths: dict[str, int], pace: float = 1.0, **given: Any) -> dict[str, float]:
    args = filled(OptimArgs.model_validate(given), widths, pace)
    return {name: getattr(args, name).peak for name in ("adapter", "rows", "text")}


def test_they_fall_with_the_bases_width() -> None:
    assert peaks({"denoiser": 32, "text": 128}) == {"adapter": 1e-3, "rows": 1e-2, "text": 1e-4}
    assert peaks(SD15_WIDTHS) == {"adapter": 1e-4, "rows": 1.7e-3, "text": 1.7e-5}
    assert peaks(SDXL_WIDTHS) == {"adapter": 1e-4, "rows": 1e-3, "text": 1e-5}


def test_a_kind_of_adapter_has_a_pace_of_its_own_and_rows_have_not() -> None:
    assert peaks(SD15_WIDTHS, 0.1) == {"adapter": 1e-5, "rows": 1.7e-3, "text": 1.7e-6}


def test_what_is_given_stays_and_what_finds_its_rate_has_one() -> None:
    given = {"adapter": {"lr": 0.5}, "rows": {"name": "prodigy"}, "text": {"name": "prodigy", "lr": 0.25}}
    assert peaks(SD15_WIDTHS, 0.1, **given) == {"adapter": 0.5, "rows": 1.0, "text": 0.25}


def test_args_that_are_not_filled_have_no_rate() -> None:
    with pytest.raises(ValueError, match="no learning rate was given, and none was filled in"):
        _ = OptimArgs().adapter.peak


@pytest.mark.parametrize(("kind", "base", "text"), [(SD15, "testbed/base", 128), (SDXL, "testbed/base-sdxl", 128)])
def test_widths_are_those_of_the_base(kind: Any, base: str, text: int) -> None:
    family = kind.load(ModelArgs.model_validate({"base": base}), torch.device("cpu"))
    assert family.widths == {"denoiser": 32, "text": text}


def test_the_published_sizes_have_these_widths() -> None:
    for name, widths in (("sd15", SD15_WIDTHS), ("sdxl", SDXL_WIDTHS)):
        towers = [sizes["hidden_size"] for part, sizes in PUBLISHED[name].items() if part.startswith("text")]
        assert max(towers) == widths["text"]
    assert PUBLISHED["sdxl"]["unet"]["block_out_channels"][0] == 320


@pytest.mark.parametrize("preset", ["object", "style", "face"])
def test_presets_leave_them_to_the_base(preset: str) -> None:
    optim = json.loads((cli.PRESETS / f"{preset}.json").read_text(encoding="utf-8"))["optim"]
    assert not [name for name, section in optim.items() if "lr" in section]


@pytest.mark.parametrize(("kind", "lr"), [("lora", 1e-3), ("full", 1e-4), ("lokr", 4e-3)])
def test_a_run_saves_the_rates_that_it_took(kind: str, lr: float, tmp_path: Path) -> None:
    write_zip(tmp_path / "cat.zip", "cat", 2)
    options = ["--adapter.kind", kind, "--runtime.steps", "1", "--runtime.batch_size", "1", "--runtime.device", "cpu"]
    few = ["--sample.steps", "1", "--sample.prompts", "a TOK", "--runtime.out", str(tmp_path), "--runtime.name", "run"]
    assert main(["object", str(tmp_path / "cat.zip"), "--model.base", "testbed/base", *options, *few]) == 0
    saved = json.loads((tmp_path / "run" / "args.json").read_text(encoding="utf-8"))["optim"]
    assert (saved["adapter"]["lr"], saved["rows"]["lr"]) == (lr, 1e-2)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["lr"]["adapter"] == pytest.approx(lr / 6)  # adaptive: where its rise begins
