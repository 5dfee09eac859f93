"""The testbed's own loop: a fit that was cut off goes on where it stopped, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from testbed import fit
from testbed.unet import make_scheduler, make_unet, v_loss


class Line(fit.Task):
    name, steps, lr, warmup, decay_steps, ema = "line", 60, 0.1, 3, 30, 0.9

    def __init__(self, dies_at: int = -1) -> None:
        self.dies_at = dies_at

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def loss(self, model: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        if step == self.dies_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(8, 4)).astype(np.float32))
        return (model(x) - x.sum(1, keepdim=True) - 0.1 * torch.randn(8, 1)).square().mean(), {}


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One process, and a resume file after every step."""
    monkeypatch.setattr(fit, "SAVE_EVERY_S", -1.0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_cut_fit_ends_where_a_whole_one_ends(tmp_path: Path, alone: None) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    fit._fit(Line(), tmp_path / "whole", 0, 1)
    with pytest.raises(KeyboardInterrupt):
        fit._fit(Line(dies_at=17), tmp_path / "cut", 0, 1)
    fit._fit(Line(), tmp_path / "cut", 0, 1)
    whole, cut = (load_file(tmp_path / name / "line.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert not list(tmp_path.glob("cut/*resume*"))
    assert (whole["weight"] - 1).abs().max() < 0.2  # and it learned


def test_the_velocity_loss_is_that_of_the_scheduler() -> None:
    torch.manual_seed(0)
    unet, scheduler = make_unet().eval(), make_scheduler()
    x0, hidden, t = torch.randn(2, 4, 16, 16), torch.randn(2, 32, 128), torch.tensor([40, 700])
    torch.manual_seed(5)
    ours = v_loss(unet, scheduler.alphas_cumprod, x0, hidden, t)
    torch.manual_seed(5)
    eps = torch.randn_like(x0)
    predicted = unet(scheduler.add_noise(x0, eps, t), t, hidden).sample
    theirs = (predicted - scheduler.get_velocity(x0, eps, t)).square().mean()
    assert torch.allclose(ours, theirs, rtol=1e-5)
