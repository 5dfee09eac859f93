"""A run that trains something for nothing: all is exported, and it ends with a sentence and status 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from trainer import cli, run
from trainer.__main__ import main
from trainer.optim.moved import NeverMoved
from trainer.rundir import RunDir


def tree(base: Path, pictures: Path, out: Path, **sections: Any) -> dict[str, Any]:
    return {
        "data": {"source": str(pictures), "caption_dropout": 0.0},
        "model": {"base": str(base)},
        "sample": {"strengths": [], "steps": 1, "prompts": ["a star"]},
        "hooks": {"tensorboard": False},
        "runtime": {"out": str(out), "name": "run", "steps": 10, "batch_size": 2, "device": "cpu"},
        **sections,
    }


def test_rows_that_no_caption_shows_are_exported_as_they_were_and_the_door_says_so(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in tiny_pictures.glob("*.txt"):
        text.write_text("a red star on a white background " * 8 + "TOK")  # cut off before the trigger
    args = tree(tiny_base, tiny_pictures, tmp_path, adapter={"rank": 2}, text={"tokens": 2, "std_weight": 0.0})
    args["runtime"]["steps"] = (
        16  # by default rows have a rate above 0 for 70 % of them, and fewer than 10 prove nothing
    )
    (tmp_path / "args.json").write_text(json.dumps(args))
    assert main([str(tmp_path / "args.json")]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "trained tensors never moved: text_encoder.rows. Their gradient was 0 all along" in said
    assert "leave them out of what is trained, or raise the rate" in said
    assert "--resume" not in said  # all updates are done
    done = RunDir(tmp_path / "run")
    assert done.report.exists()
    assert {"run.safetensors", "run_embedding.safetensors"} <= {path.name for path in done.export.iterdir()}
    assert len(done.metrics.read_text().splitlines()) == 16
    rows = load_file(done.export / "run_embedding.safetensors")["emb_params"]
    assert rows.shape == (2, 32)
    assert rows.std(dim=1).min() > 0


def test_a_rate_below_what_a_tensors_precision_shows_is_an_error_after_the_export(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    args = tree(tiny_base, tiny_pictures, tmp_path, adapter={"rank": 2}, optim={"adapter": {"lr": 1e-20}})
    with run.opened(cli.validate(args)) as session:
        steps = session.steps()
        for _ in range(10):
            next(steps)
        with pytest.raises(NeverMoved, match=r"\d+ of \d+ trained tensors never moved: .*lora_A.* too small for their"):
            next(steps)
    exported = load_file(session.dir.export / "run.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in exported.items() if "lora_down" in name)
