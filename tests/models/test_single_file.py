"""Single files of SD2 and SDXL: the same model as the folder, and what the file itself says of its noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from ldm import clip, open_clip, write
from safetensors.torch import load_file, save_file

from trainer import registry
from trainer.args import ModelArgs
from trainer.models import FAMILIES, sniff
from trainer.models.latent import LatentFamily
from trainer.models.parts import stated
from trainer.types import BaseModelError

CPU = torch.device("cpu")
PROMPTS = ["a red star", ""]


def load(base: Path, **options: Any) -> LatentFamily:
    args = sniff.named(ModelArgs(base=str(base), **options))
    return registry.load(FAMILIES, args.family, "family").load(args, CPU)


@pytest.fixture(scope="module")
def files(tiny_sd2: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    sd2 = StableDiffusionPipeline.from_pretrained(tiny_sd2, dtype=torch.float32)
    sdxl = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32)
    towers = clip("conditioner.embedders.0.transformer."), open_clip("conditioner.embedders.1.model.")
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    return {
        "sd2": write(sd2, folder / "sd2.safetensors", open_clip("cond_stage_model.model.")),
        "sdxl": write(sdxl, folder / "sdxl.safetensors", *towers),
        "sdxl-v": write(sdxl, folder / "v.safetensors", *towers, extra=marks),
    }


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_a_single_file_is_the_same_model(name: str, files: dict[str, Path], request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{name}")
    single, whole = load(files[name], config=str(folder)), load(folder)
    assert (single.name, single.path.target, single.resolution) == (name, whole.path.target, whole.resolution)
    one, other = single.encode(PROMPTS), whole.encode(PROMPTS)
    assert torch.equal(one.hidden, other.hidden)
    if other.pooled is not None:
        assert one.pooled is not None
        assert torch.equal(one.pooled, other.pooled)
    for mine, theirs in ((single.denoiser, whole.denoiser), (single.vae, whole.vae)):
        state = theirs.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in mine.state_dict().items())


def test_the_files_own_marks_count_more_than_the_config(files: dict[str, Path], tiny_sdxl: Path) -> None:
    plain, marked = (load(files[name], config=str(tiny_sdxl)) for name in ("sdxl", "sdxl-v"))
    assert (plain.path.target, marked.path.target) == ("epsilon", "v_prediction")
    last = torch.tensor([999])
    assert plain.path.snr(last).item() > 1e-3
    assert marked.path.snr(last).item() < 1e-6, "the picture is gone at the end"
    config = marked.pipeline().scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert config.timestep_spacing == "trailing"
    assert load(files["sdxl-v"], config=str(tiny_sdxl), prediction="epsilon").path.target == "epsilon"


@pytest.mark.parametrize(
    ("keys", "facts", "expected"),
    [
        (set[str](), {}, "epsilon"),
        ({"v_pred"}, {}, "v_prediction"),
        (set[str](), {"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"v_pred"}, {"modelspec.prediction_type": "epsilon"}, "v_prediction"),
    ],
)
def test_what_a_file_says_of_its_prediction(keys: set[str], facts: dict[str, str], expected: str) -> None:
    scheduler = PNDMScheduler(prediction_type="epsilon")
    found = stated(scheduler, keys, facts)
    assert found.config.prediction_type == expected
    assert isinstance(found, PNDMScheduler)


def test_a_sampler_that_cannot_start_without_a_picture_is_exchanged() -> None:
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    found = stated(scheduler, {"ztsnr", "v_pred"}, {})
    assert found.config.rescale_betas_zero_snr is True
    assert found.alphas_cumprod[-1] < 1e-6
    torch.testing.assert_close(found.alphas_cumprod[0], scheduler.alphas_cumprod[0])


def test_a_file_that_lacks_weights_is_refused(files: dict[str, Path], tiny_sdxl: Path, tmp_path: Path) -> None:
    weights = load_file(files["sdxl"])
    kept = {key: value for key, value in weights.items() if "middle_block.1." not in key}
    save_file(kept, tmp_path / "part.safetensors")
    with pytest.raises(BaseModelError, match="it lacks weights of the model"):
        load(tmp_path / "part.safetensors", config=str(tiny_sdxl))


def test_a_config_of_another_model_is_refused(files: dict[str, Path], tiny_base: Path) -> None:
    with pytest.raises(BaseModelError, match=r"does model\.config"):
        load(files["sdxl"], config=str(tiny_base))
