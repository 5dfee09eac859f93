"""A whole run on a base that predicts x0: it trains, draws and exports."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from trainer import cli, run


def test_a_base_that_predicts_x0_trains_draws_and_exports(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    tree = {
        "data": {"source": str(tiny_pictures)},
        "model": {"base": str(tiny_base), "prediction": "sample"},
        "adapter": {"rank": 2},
        "objective": {"min_snr_gamma": 5.0},
        "sample": {"prompts": ["a {trigger}"], "strengths": [], "steps": 2},
        "runtime": {"out": str(tmp_path), "name": "x0", "steps": 2, "batch_size": 2, "device": "cpu"},
    }
    with run.opened(cli.validate(tree)) as session:
        family = session.run.family
        assert family.path.target == family.pipeline().scheduler.config.prediction_type == "sample"
        assert len(list(session.steps())) == 2
        exported = session.dir.export / "x0.safetensors"
    with safe_open(exported, "pt") as file:
        metadata = file.metadata()
    assert "modelspec.prediction_type" not in metadata  # which has no word for it
    assert json.loads((tmp_path / "x0/args.json").read_text())["model"]["prediction"] == "sample"
