"""Sampling against the stock pipeline, and that nothing is left changed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from trainer import sampler
from trainer.adapters.lora import LoRA
from trainer.adapters.textual_inversion import TextualInversion
from trainer.args import AdapterArgs, ModelArgs, TextArgs
from trainer.models.sd15 import SD15

PROMPTS = ["a red star", "a blue circle on a green background"]


@pytest.fixture
def family(tiny_base: Path) -> SD15:
    return SD15.load(ModelArgs(base=str(tiny_base)), torch.device("cpu"))


def strong_lora(family: SD15, dropout: float = 0.0) -> LoRA:
    lora = LoRA(AdapterArgs(dropout=dropout), seed=0)
    lora.attach(family)
    generator = torch.Generator().manual_seed(5)
    for tensor in lora.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return lora


def generate(family: SD15, prompts: list[str] | None = None, **options: object) -> list[Image.Image]:
    prompts = prompts or PROMPTS
    return sampler.generate(family, prompts, **{"seeds": range(len(prompts)), "steps": 3, "guidance": 3.0, **options})


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in pictures])


def test_pictures_are_the_stock_pipelines(family: SD15, tiny_base: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
    expected = pipe(PROMPTS, num_inference_steps=3, guidance_scale=3.0, generator=generators).images
    assert np.array_equal(pixels(generate(family, seeds=[4, 9])), pixels(expected))


def test_a_picture_depends_on_its_own_seed_alone(family: SD15) -> None:
    many = generate(family, PROMPTS * 5, seeds=range(10))  # more than one batch
    for place in (1, 9):
        alone = generate(family, [(PROMPTS * 5)[place]], seeds=[place])
        assert abs(pixels(alone) - pixels([many[place]])).max() <= 1  # batched sums round differently
    assert not np.array_equal(pixels(many[0:1]), pixels(many[2:3]))


def test_size_guidance_and_negative_prompt_act(family: SD15) -> None:
    assert generate(family, width=48, height=32)[0].size == (48, 32)
    plain = pixels(generate(family))
    assert plain.shape[1:3] == (32, 32)
    assert not np.array_equal(plain, pixels(generate(family, guidance=9.0)))
    assert not np.array_equal(plain, pixels(generate(family, negative="a photo of a flower")))


def test_strength_scales_the_adapter(family: SD15) -> None:
    base = pixels(generate(family))
    lora = strong_lora(family)
    full = pixels(generate(family, adapters=[lora]))
    assert np.array_equal(pixels(generate(family, adapters=[lora], strength=0.0)), base)
    half = pixels(generate(family, adapters=[lora], strength=0.5))
    assert not np.array_equal(half, full)
    for name, tensor in lora.state_dict().items():
        if name.endswith("lora_B.weight"):
            tensor.mul_(0.5)
    assert abs(pixels(generate(family, adapters=[lora])) - half).max() <= 1


def test_the_trigger_is_expanded_in_both_prompts(family: SD15) -> None:
    inversion = TextualInversion(TextArgs(tokens=1), "TOK", seed=0)
    inversion.attach(family)
    prompts = ["a TOK"]
    before = pixels(generate(family, prompts)), pixels(generate(family, PROMPTS[:1], negative="TOK"))
    inversion.state_dict()["text_encoder.rows"].mul_(-9.0)
    assert not np.array_equal(pixels(generate(family, prompts)), before[0])
    assert not np.array_equal(pixels(generate(family, PROMPTS[:1], negative="TOK")), before[1])


def test_random_states_and_modes_are_put_back(family: SD15) -> None:
    lora = strong_lora(family, dropout=0.5)
    modes = {name: module.training for name, module in family.denoiser.named_modules()}
    assert any(modes.values())

    def draw(*_: object) -> None:
        torch.rand(1)

    family.denoiser.register_forward_pre_hook(draw)  # a model that uses the global generator
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    first = pixels(generate(family, adapters=[lora]))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert {name: module.training for name, module in family.denoiser.named_modules()} == modes
    torch.manual_seed(4)
    assert np.array_equal(pixels(generate(family, adapters=[lora])), first)  # dropout was off
    assert all(parameter.requires_grad for name, parameter in family.denoiser.named_parameters() if "lora_" in name)


def test_modes_are_put_back_after_a_failure(family: SD15) -> None:
    lora = strong_lora(family, dropout=0.5)
    with pytest.raises(ValueError, match="divisible"):
        generate(family, adapters=[lora], strength=0.5, width=33)
    assert any(module.training for module in family.denoiser.modules())
    assert {layer.scaling["default"] for layer in family.denoiser.modules() if hasattr(layer, "scaling")} == {1.0}


def test_each_prompt_needs_a_seed(family: SD15) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        generate(family, seeds=[1])


def test_grid_places_rows_columns_and_upscales(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (64, 32), "blue")
    path = tmp_path / "samples" / "grid.png"
    sampler.grid([("before", [red, blue]), ("after, strength 1", [blue])], ["a red star", "words " * 20], path)
    sheet = Image.open(path).convert("RGB")
    array = np.asarray(sheet)
    assert int((array == (255, 0, 0)).all(axis=2).sum()) == 128 * 128
    blues = np.argwhere((array == (0, 0, 255)).all(axis=2))
    assert len(blues) == 2 * 128 * 64
    reds = np.argwhere((array == (255, 0, 0)).all(axis=2))
    assert reds[:, 1].max() < blues[blues[:, 0] < reds[:, 0].max()][:, 1].min()  # same row, to the right
    top = array[: reds[:, 0].min()]
    assert int((top < 100).all(axis=2).sum()) > 200  # the wrapped prompts
    assert int((array[reds[:, 0].min() :, :100] < 100).all(axis=2).sum()) > 100  # the row labels
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_grid_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        sampler.grid([("before", [])], ["a star"], tmp_path / "grid.png")
