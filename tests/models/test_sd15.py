"""The SD1.5 family against the stock diffusers pipeline and its modules, and every wrong base."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from ldm import clip, write
from safetensors.torch import load_file, save_file

from trainer.args import ModelArgs
from trainer.models.sd15 import SD15
from trainer.types import BaseModelError, Cond

CPU = torch.device("cpu")
PROMPTS = ["a red star", "", "a photo of a blue circle on a green background"]


def load(base: Path | str, **options: str) -> SD15:
    return SD15.load(ModelArgs(base=str(base), **options), CPU)


@pytest.fixture(scope="module")
def family(tiny_base: Path) -> SD15:
    return load(tiny_base)


@pytest.fixture(scope="module")
def stock(tiny_base: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_base, dtype=torch.float32)


def test_encode_is_the_pipelines_own(family: SD15, stock: StableDiffusionPipeline) -> None:
    expected, _ = stock.encode_prompt(PROMPTS, CPU, 1, False)
    assert torch.equal(family.encode(PROMPTS).hidden, expected)
    assert expected.shape[1] == 32  # the tokenizer's length, not 77


def test_encode_gives_repeated_captions_their_own_place(family: SD15) -> None:
    hidden = family.encode(["a red star", "", "a red star"]).hidden
    assert torch.equal(hidden[0], hidden[2])
    assert not torch.equal(hidden[0], hidden[1])


def test_encode_cuts_and_names_long_captions_once(
    family: SD15, stock: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a red star on a blue background " * 8
    expected, _ = stock.encode_prompt([long], CPU, 1, False)
    with caplog.at_level(logging.WARNING, logger="trainer.models.clip_text"):
        assert torch.equal(family.encode([long]).hidden, expected)
        family.encode([long])
    assert [r.name for r in caplog.records].count("trainer.models.clip_text") == 1


def test_encode_images_is_the_scaled_posterior_mean(family: SD15, stock: StableDiffusionPipeline) -> None:
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = stock.vae.encode(pixels).latent_dist.mean * stock.vae.config.scaling_factor
    latents = family.encode_images(pixels)
    assert latents.shape == (2, 4, 16, 24)
    assert torch.equal(latents, expected)


def test_predict_is_the_unet(family: SD15, stock: StableDiffusionPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    xt, hidden = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 32, 32, generator=generator)
    t = torch.tensor([10, 900])
    with torch.no_grad():
        expected = stock.unet(xt, t, hidden).sample
        assert torch.equal(family.predict(xt, t, Cond(hidden)), expected)


def test_predict_keeps_the_callers_dtype(tiny_base: Path) -> None:
    half = load(tiny_base, dtype="bf16")
    assert {p.dtype for m in (half.denoiser, half.vae, *half.text_encoders.values()) for p in m.parameters()} == {
        torch.bfloat16
    }
    cond = half.encode(["a star"])
    assert half.predict(torch.randn(1, 4, 16, 16), torch.tensor([5]), cond).dtype == torch.float32
    assert half.encode_images(torch.zeros(1, 3, 32, 32)).dtype == torch.float32


def test_states_its_sizes_and_target(family: SD15, tiny_base: Path, tiny_base_deep: Path) -> None:
    assert (family.resolution, family.latent_scale, family.bucket_step) == (32, 2, 4)
    assert family.path.target == "v_prediction"
    assert load(tiny_base_deep).path.target == "epsilon"
    assert load(tiny_base, prediction="epsilon").pipeline().scheduler.config.prediction_type == "epsilon"


def test_is_frozen_and_in_eval_mode(family: SD15) -> None:
    for module in (family.denoiser, family.vae, *family.text_encoders.values()):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(part.training for part in module.modules())


def test_pipeline_gives_the_stock_pictures(family: SD15, stock: StableDiffusionPipeline) -> None:
    def sample(pipe: StableDiffusionPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipe("a red star", num_inference_steps=3, generator=generator, output_type="pt").images

    assert torch.equal(sample(family.pipeline()), sample(stock))


def test_fingerprint_is_of_the_base_and_of_each_part(family: SD15, tiny_base: Path, tiny_base_deep: Path) -> None:
    again, other = load(tiny_base), load(tiny_base_deep)
    for part in ("vae", "text_encoder", "denoiser"):
        assert family.fingerprint(part) == again.fingerprint(part) != other.fingerprint(part)
    assert len({family.fingerprint(part) for part in ("vae", "text_encoder", "denoiser")}) == 3
    assert load(tiny_base, dtype="bf16").fingerprint("vae") != family.fingerprint("vae")


def test_fingerprint_does_not_depend_on_the_folder(family: SD15, tiny_base: Path, tmp_path: Path) -> None:
    copy = load(shutil.copytree(tiny_base, tmp_path / "elsewhere"))
    for part in ("vae", "text_encoder", "denoiser"):
        assert copy.fingerprint(part) == family.fingerprint(part)


def edited(base: Path, folder: Path, file: str, **changes: object) -> Path:
    """A copy of `base` with keys of one of its JSON files changed."""
    shutil.copytree(base, folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def refusal(base: Path | str, **options: str) -> str:
    with pytest.raises(BaseModelError) as caught:
        load(base, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refuses_a_missing_path(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal(tmp_path / "nowhere.safetensors")


def test_refuses_a_hub_id_that_is_not_there() -> None:
    assert "'nobody/nothing' is no folder or file here" in refusal("nobody/nothing")


def test_refuses_a_folder_without_index(tmp_path: Path) -> None:
    assert "model_index.json" in refusal(tmp_path)


def test_refuses_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    assert "pickle" in refusal(tmp_path / "model.ckpt")


def test_refuses_an_sdxl_folder(tiny_base: Path, tmp_path: Path) -> None:
    base = edited(tiny_base, tmp_path / "xl", "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "is Stable Diffusion XL, and family sd15 takes Stable Diffusion 1.5; set model.family to sdxl" in refusal(
        base
    )


def test_refuses_a_missing_tokenizer(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    shutil.rmtree(base / "tokenizer")
    assert "tokenizer" in refusal(base)


def test_refuses_weights_that_are_missing_or_damaged(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        path = base / f"{part}.safetensors"
        whole = path.read_bytes()
        weights = load_file(path)
        weights.pop(min(weights))
        save_file(weights, path, metadata={"format": "pt"})
        assert "lacks 1 of its weights" in refusal(base)
        path.write_bytes(whole[:1000])
        assert f"cannot load {part.split('/')[0]}" in refusal(base)
        path.write_bytes(whole)


def test_refuses_an_inpainting_unet(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    type(pipe.unet).from_config({**pipe.unet.config, "in_channels": 9}).save_pretrained(base / "unet")
    assert "inpainting" in refusal(base)


@pytest.fixture(scope="module")
def single_file(stock: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as one checkpoint with the original Stable Diffusion names."""
    return write(stock, tmp_path_factory.mktemp("single") / "model.safetensors", clip("cond_stage_model.transformer."))


def test_single_file_is_the_same_model(family: SD15, single_file: Path, tiny_base: Path) -> None:
    single = load(single_file, config=str(tiny_base))
    assert single.path.target == "v_prediction"
    assert torch.equal(single.encode(PROMPTS).hidden, family.encode(PROMPTS).hidden)
    for one, other in ((single.denoiser, family.denoiser), (single.vae, family.vae)):
        state = other.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())


def test_single_file_without_config_says_what_to_set(single_file: Path) -> None:
    assert "model.config" in refusal(single_file)


WHOLE = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "is a LoRA"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "is a LoRA"),
        ([*WHOLE, "conditioner.embedders.1.model.ln_final.weight"], "is Stable Diffusion XL"),
        ([*WHOLE, "conditioner.embedders.0.model.ln_final.weight"], "is the SDXL refiner"),
        ([*WHOLE, "cond_stage_model.model.ln_final.weight"], "is Stable Diffusion 2, and"),
        ([WHOLE[0], "cond_stage_model.transformer.text_model.x"], "it has no 'first_stage_model.' tensors"),
        (["something.else"], "is no whole checkpoint of Stable Diffusion 1.5"),
    ],
)
def test_refuses_other_single_files(tmp_path: Path, keys: list[str], says: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file({key: torch.zeros(1) for key in keys}, path)
    assert says in refusal(path)


def test_refuses_a_damaged_single_file(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"not at all")
    assert "damaged" in refusal(path)
