"""What `sample.*` says of a run's own pictures reaches the sampler; what cannot be drawn is said before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from trainer import cli, run, sampler
from trainer.models.sd15 import SD15


def tree(base: Path, pictures: Path, out: Path, **sample: Any) -> dict[str, Any]:
    return {
        "data": {"source": str(pictures)},
        "model": {"base": str(base)},
        "sample": {"strengths": [], "steps": 2, "prompts": ["a red star"], "seed": 5, **sample},
        "hooks": {"tensorboard": False},
        "runtime": {"out": str(out), "steps": 1, "batch_size": 1, "device": "cpu"},
    }


def test_the_grid_is_drawn_as_asked(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"scheduler": "Euler a", "negative": "a square", "width": 48, "height": 32}
    args = cli.validate(tree(tiny_base, tiny_pictures, tmp_path, **asked))
    assert args.sample.scheduler == "euler_a"
    with run.opened(args) as session:
        list(session.steps())
        (before,) = session.dir.samples.glob("before/*.png")
    family = SD15.load(args.model, torch.device("cpu"))
    asked["scheduler"] = "euler_a"
    expected = sampler.generate(family, ["a red star"], seeds=[5], steps=2, guidance=3.0, **asked)[0]
    assert Image.open(before).tobytes() == expected.tobytes()
    plain = sampler.generate(family, ["a red star"], seeds=[5], steps=2, guidance=3.0, width=48, height=32)[0]
    assert plain.tobytes() != expected.tobytes()


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"width": 33}, r"sample: 33 x 32 pixels cannot be drawn"),
        ({"scheduler": "lcm", "steps": 60}, r"sample: LCMScheduler makes no 60 steps"),
    ],
)
def test_what_cannot_be_drawn_leaves_no_run(
    sample: dict[str, Any], said: str, tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    args = cli.validate(tree(tiny_base, tiny_pictures, tmp_path / "runs", **sample))
    with pytest.raises(run.RunError, match=said), run.opened(args):
        pass
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"scheduler": "eular"}, r"sample\.scheduler: scheduler 'eular' is unknown; did you mean euler\?"),
        ({"negative": "x", "guidance": 1.0}, r"sample\.negative is given, but sample\.guidance is 1"),
    ],
)
def test_a_mistake_is_named(sample: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(cli.CommandError, match=said):
        cli.validate(tree(tmp_path, tmp_path, tmp_path, **sample))
