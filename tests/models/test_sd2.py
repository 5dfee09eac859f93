"""The SD2 family against the stock pipeline, and bases whose noise ends without a picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from trainer import sampler
from trainer.args import ModelArgs, ObjectiveArgs
from trainer.models.sd2 import SD2
from trainer.models.sdxl import SDXL
from trainer.objectives.denoise import Denoise
from trainer.types import BaseModelError, Batch

CPU = torch.device("cpu")
PROMPTS = ["a red star", "", "a photo of a blue circle"]
ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def args(base: Path, **options: Any) -> ModelArgs:
    return ModelArgs.model_validate({"base": str(base), **options})


def test_sd2_is_the_stock_pipeline(tiny_sd2: Path) -> None:
    family = SD2.load(args(tiny_sd2), CPU)
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd2, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    expected, _ = stock.encode_prompt(PROMPTS, CPU, 1, False)
    assert torch.equal(family.encode(PROMPTS).hidden, expected)
    assert family.path.target == "v_prediction"
    ours = sampler.generate(family, ["a red star"], seeds=[3], steps=2, guidance=4.0)[0]
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": 32, "height": 32}
    theirs = stock("a red star", generator=torch.Generator().manual_seed(3), **options).images[0]
    assert ours.tobytes() == theirs.tobytes()


def test_sd2_refuses_other_bases(tiny_base: Path, tiny_sdxl: Path) -> None:
    with pytest.raises(BaseModelError, match=r"is Stable Diffusion 1\.5, and family sd2 takes Stable Diffusion 2;"):
        SD2.load(args(tiny_base), CPU)
    with pytest.raises(BaseModelError, match=r"set model\.family to sdxl or auto"):
        SD2.load(args(tiny_sdxl), CPU)


@pytest.mark.parametrize("exact", [False, True], ids=["euler", "ddim"])
def test_a_path_that_ends_in_pure_noise(tiny_sdxl: Path, tmp_path: Path, exact: bool) -> None:
    """Stated by a folder's scheduler: trained there, and drawn from there."""
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    file = base / "scheduler" / "scheduler_config.json"
    config = {**json.loads(file.read_text()), **ZERO_SNR}
    file.write_text(json.dumps(config))
    if exact:
        DDIMScheduler.from_config(config).save_pretrained(base / "scheduler")
        index = json.loads((base / "model_index.json").read_text())
        (base / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    family = SDXL.load(args(base), CPU)
    last = torch.tensor([999, 999])
    assert family.path.target == "v_prediction"
    assert family.path.snr(last).max().item() < 1e-7
    assert not exact or family.path.alpha(last).max().item() == 0.0
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 16, 16, generator=draw), torch.randn(2, 4, 16, 16, generator=draw)
    torch.testing.assert_close(family.path.noisy(x0, eps, last), eps, rtol=0, atol=2e-3)
    torch.testing.assert_close(family.path.target_of(x0, eps, last), -x0, rtol=0, atol=2e-3)
    options = ObjectiveArgs.model_validate({"t_min": 999, "t_max": 1000})
    batch = Batch(x0, family.encode(["a star", ""]), ("a", "b"), torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = Denoise(options, family.path, family.predict)(family.predict, batch)
    assert 0.1 < loss.total.item() < 10
    pipe = family.pipeline()
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps[0].item() == 999, "sampling begins where the picture is gone"
    assert sampler.generate(family, ["a star"], seeds=[1], steps=2, guidance=2.0)[0].size == (32, 32)
