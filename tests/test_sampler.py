"""Sampling against the stock pipeline, and that nothing is left changed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image

from trainer import registry, sampler
from trainer.adapters.lora import LoRA
from trainer.adapters.textual_inversion import TextualInversion
from trainer.args import AdapterArgs, ModelArgs, TextArgs
from trainer.models import FAMILIES, sniff
from trainer.models.sd15 import SD15

PROMPTS = ["a red star", "a blue circle on a green background"]


def loaded(base: Path) -> Any:
    args = sniff.named(ModelArgs(base=str(base)))
    return registry.load(FAMILIES, args.family, "model.family").load(args, torch.device("cpu"))


@pytest.fixture
def family(tiny_base: Path) -> SD15:
    return loaded(tiny_base)


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


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sdxl"])
@pytest.mark.parametrize("scheduler", ["euler_a", "dpm++_2m_sde_karras", "heun"])
def test_a_seed_is_a_picture_in_any_company(base: str, scheduler: str, request: pytest.FixtureRequest) -> None:
    on = loaded(request.getfixturevalue(base))
    options: dict[str, Any] = {"scheduler": scheduler, "steps": 3}
    alone = pixels(generate(on, ["a red star"], seeds=[7], **options))
    among = generate(on, ["a blue circle", "", "a red star"], seeds=[1, 2, 7], **options)
    assert abs(pixels(among[2:]) - alone).max() <= 1
    assert np.array_equal(pixels(generate(on, ["", "a red star"], seeds=[2, 7], batch=1, **options))[1:], alone)
    assert not np.array_equal(pixels(generate(on, ["a red star"], seeds=[8], **options)), alone)


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sdxl"])
def test_a_scheduler_is_the_stock_pipelines(base: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    told = {"negative_prompt": "a square", "num_inference_steps": 3, "guidance_scale": 3.0, "guidance_rescale": 0.7}
    generator = torch.Generator().manual_seed(5)
    expected = pipe("a red star", width=48, height=32, generator=generator, **told).images
    asked: dict[str, Any] = {"negative": "a square", "scheduler": "euler_a", "width": 48, "height": 32}
    ours = generate(loaded(folder), ["a red star"], seeds=[5], rescale=0.7, **asked)
    assert np.array_equal(pixels(ours), pixels(expected))
    assert not np.array_equal(pixels(generate(loaded(folder), ["a red star"], seeds=[5], **asked)), pixels(expected))


def photo(width: int = 32, height: int = 32) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sdxl"])
def test_a_picture_to_begin_with_is_the_stock_pipelines(base: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    pipe: Any = AutoPipelineForImage2Image.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    told = {"negative_prompt": ["", ""], "num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.5}
    expected = pipe(["a red star", "a star"], image=[photo(), photo()], generator=generators, **told).images
    on, start = loaded(folder), sampler.Start(photo(), 0.5)
    ours = generate(on, ["a red star", "a star"], seeds=[5, 6], steps=4, start=start)
    assert np.array_equal(pixels(ours), pixels(expected))
    assert generate(on, ["a"], steps=4, start=sampler.Start(photo(64, 40), 0.5))[0].size == (64, 40)
    assert generate(on, ["a"], steps=4, start=sampler.Start(photo(65, 41), 0.5), width=32, height=40)[0].size == (
        32,
        40,
    )


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sdxl"])
def test_what_is_not_masked_stays_to_the_last_bit(base: str, request: pytest.FixtureRequest) -> None:
    on, mask = loaded(request.getfixturevalue(base)), Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    start = sampler.Start(photo(), 1.0, mask)
    drawn = pixels(generate(on, ["a red star"], seeds=[5], start=start))[0]
    whole = pixels([photo()])[0]
    assert np.array_equal(drawn[:, 16:], whole[:, 16:])
    assert (drawn[:, :16] != whole[:, :16]).mean() > 0.9
    pipe: Any = AutoPipelineForInpainting.from_pipe(on.pipeline())
    pipe.set_progress_bar_config(disable=True)
    generator, told = torch.Generator().manual_seed(5), {"num_inference_steps": 3, "guidance_scale": 3.0}
    images = {"image": photo(), "mask_image": mask, "strength": 1.0, "width": 32, "height": 32}
    expected = pixels(pipe("a red star", negative_prompt="", generator=generator, **told, **images).images)[0]
    assert np.array_equal(drawn[:, :16], expected[:, :16])


def test_what_cannot_be_drawn_is_said(family: SD15) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("33 x 40 pixels cannot be drawn.* divisible by 8; take a width of 32 and a height of 40",
         {"width": 33, "height": 40}),
        ("65 x 41 pixels", {"start": sampler.Start(photo(65, 41), 0.5)}),
        ("0.2 of 3 steps is none", {"start": sampler.Start(photo(), 0.2)}),
        ("Img2ImgPipeline has no guidance rescale", {"start": sampler.Start(photo(), 0.9), "rescale": 0.5}),
        ("the mask has 8 x 8 pixels, and the picture 32 x 32",
         {"start": sampler.Start(photo(), 1.0, Image.new("L", (8, 8)))}),
        ("LCMScheduler makes no 60 steps", {"scheduler": "lcm", "steps": 60}),
    ]  # fmt: skip
    for said, options in cases:
        with pytest.raises(sampler.SampleError, match=said):
            generate(family, ["a"], **options)


@pytest.mark.parametrize("scheduler", [None, "heun", "pndm"])
def test_progress_is_told_in_steps_of_pictures(family: SD15, scheduler: str | None) -> None:
    told: list[int] = []
    generate(family, ["a"] * 3, batch=2, scheduler=scheduler, drawn=told.append)
    assert sum(told) == 3 * 3
    assert len(told) >= 6
    told.clear()
    generate(family, ["a"], steps=4, start=sampler.Start(photo(), 0.5), drawn=told.append)
    assert sum(told) == 4


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


def test_a_grid_has_room_for_its_title(tmp_path: Path) -> None:
    red = Image.new("RGB", (32, 32), "red")
    for name, title in (("without", ""), ("with", "a red star on a green background " * 3)):
        sampler.grid([("1", [red])], ["seed 1"], tmp_path / f"{name}.png", title)
    without, titled = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("without", "with"))
    added = len(titled) - len(without)
    assert added >= 3 * sampler.LINE
    assert np.array_equal(titled[added + sampler.GAP :], without[sampler.GAP :])
    assert int((titled[:added] < 100).all(axis=2).sum()) > 200


def test_grid_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        sampler.grid([("before", [])], ["a star"], tmp_path / "grid.png")
