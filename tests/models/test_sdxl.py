"""The SDXL family against the stock diffusers pipeline: text, sizes, predictions, pictures, wrong bases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from trainer import sampler
from trainer.args import ModelArgs
from trainer.models.sdxl import SDXL
from trainer.types import BaseModelError, Cond

CPU = torch.device("cpu")
PROMPTS = ["a red star", "", "a photo of a blue circle on a green background"]


def load(base: Path | str, **options: Any) -> SDXL:
    return SDXL.load(ModelArgs(base=str(base), **options), CPU)


def edited(base: Path, folder: Path, file: str, **changes: object) -> Path:
    """A copy of `base` with keys of one of its JSON files changed."""
    shutil.copytree(base, folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture(scope="module")
def family(tiny_sdxl: Path) -> SDXL:
    return load(tiny_sdxl)


@pytest.fixture(scope="module")
def stock(tiny_sdxl: Path) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_encode_is_the_pipelines_own(family: SDXL, stock: StableDiffusionXLPipeline) -> None:
    hidden, _, pooled, _ = stock.encode_prompt(PROMPTS, device=CPU, do_classifier_free_guidance=False)
    cond = family.encode(PROMPTS)
    assert cond.pooled is not None
    assert (hidden.shape, pooled.shape) == ((3, 32, 56), (3, 20))
    assert torch.equal(cond.hidden, hidden)
    assert torch.equal(cond.pooled, pooled)


def test_encode_gives_repeated_captions_their_own_place(family: SDXL) -> None:
    cond, alone = family.encode(["a red star", "", "a red star"]), family.encode(["a red star", ""])
    assert cond.pooled is not None
    assert alone.pooled is not None
    assert torch.equal(cond.hidden[[0, 1]], alone.hidden)
    assert torch.equal(cond.pooled, alone.pooled[[0, 1, 0]])


def test_an_empty_negative_prompt_is_encoded_and_none_is_zeros(family: SDXL, stock: StableDiffusionXLPipeline) -> None:
    """What sampling does with the empty prompt is what training dropped captions to."""
    assert family.pipeline().config.force_zeros_for_empty_prompt is stock.config.force_zeros_for_empty_prompt is True
    empty = family.encode([""])
    _, negative, _, pooled = family.pipeline().encode_prompt("a star", device=CPU, negative_prompt="")
    assert torch.equal(negative, empty.hidden)
    assert torch.equal(pooled, empty.pooled)
    _, negative, _, pooled = family.pipeline().encode_prompt("a star", device=CPU)
    assert not negative.any()
    assert not pooled.any()


def test_force_zeros_is_the_bases_own(tiny_sdxl: Path, tmp_path: Path) -> None:
    base = edited(tiny_sdxl, tmp_path / "base", "model_index.json", force_zeros_for_empty_prompt=False)
    assert load(base).pipeline().config.force_zeros_for_empty_prompt is False


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 16, 24, generator=generator),
        torch.randn(2, 32, 56, generator=generator),
        torch.randn(2, 20, generator=generator),
    )


def test_predict_tells_the_unet_the_sizes(family: SDXL, stock: StableDiffusionXLPipeline) -> None:
    xt, hidden, pooled = drawn()
    sizes, t = torch.tensor([[60.0, 80, 4, 6, 32, 48], [32, 48, 0, 0, 32, 48]]), torch.tensor([10, 900])
    own = [stock._get_add_time_ids((60, 80), (4, 6), (32, 48), torch.float32, 20)]
    own.append(stock._get_add_time_ids((32, 48), (0, 0), (32, 48), torch.float32, 20))
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": torch.cat(own)}
        expected = stock.unet(xt, t, hidden, added_cond_kwargs=added).sample
        assert torch.equal(family.predict(xt, t, Cond(hidden, pooled, sizes)), expected)
        assert not torch.allclose(family.predict(xt, t, Cond(hidden, pooled, sizes[[1, 1]]))[0], expected[0])


def test_without_sizes_it_is_a_whole_picture_of_the_latents_size(family: SDXL) -> None:
    xt, hidden, pooled = drawn()
    t, whole = torch.tensor([10, 900]), torch.tensor([[32.0, 48, 0, 0, 32, 48]] * 2)
    with torch.no_grad():
        assert torch.equal(
            family.predict(xt, t, Cond(hidden, pooled)), family.predict(xt, t, Cond(hidden, pooled, whole))
        )


def test_pictures_are_the_stock_pipelines(family: SDXL, stock: StableDiffusionXLPipeline) -> None:
    ours = sampler.generate(family, ["a red star"], seeds=[3], steps=3, guidance=4.0)[0]
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "width": 32, "height": 32}
    generator = torch.Generator().manual_seed(3)
    theirs = stock("a red star", negative_prompt="", generator=generator, **options).images[0]
    assert ours.tobytes() == theirs.tobytes()
    zeros = stock("a red star", generator=generator.manual_seed(3), **options).images[0]
    assert ours.tobytes() != zeros.tobytes()


def test_states_its_sizes_and_target(family: SDXL) -> None:
    assert (family.resolution, family.latent_scale, family.bucket_step) == (32, 2, 4)
    assert family.path.target == "epsilon"


def test_fingerprints_tell_the_parts_apart(family: SDXL, tiny_sdxl: Path) -> None:
    parts, again = ("vae", "text_encoder", "text_encoder_2", "denoiser"), load(tiny_sdxl)
    assert len({family.fingerprint(part) for part in parts}) == 4
    assert [family.fingerprint(part) for part in parts] == [again.fingerprint(part) for part in parts]


def refusal(base: Path | str, **options: Any) -> str:
    with pytest.raises(BaseModelError) as caught:
        load(base, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refuses_other_families(tiny_base: Path, tiny_sd2: Path) -> None:
    assert "is Stable Diffusion 1.5, and family sdxl takes Stable Diffusion XL" in refusal(tiny_base)
    assert "set model.family to sd2 or auto" in refusal(tiny_sd2)


def test_refuses_a_refiners_sizes(tiny_sdxl: Path, tmp_path: Path) -> None:
    """The refiner is told five numbers about a picture, not six."""
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    pipe = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32)
    config = {**pipe.unet.config, "projection_class_embeddings_input_dim": 5 * 8 + 20}
    type(pipe.unet).from_config(config).save_pretrained(base / "unet")
    assert "wants 60 numbers beside the prompt" in refusal(base)


def test_refuses_a_scheduler_without_a_path(tiny_sdxl: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
    (base / "model_index.json").write_text(json.dumps(index))
    (base / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
    assert "EDMEulerScheduler, has no alphas_cumprod" in refusal(base)
