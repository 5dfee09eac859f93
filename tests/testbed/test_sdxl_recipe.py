"""The second base's recipe: it begins as the first base, its text states are SDXL's, its sizes say what was cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from testbed.pictures import Scene, Thing, render
from testbed.recipe import tokenizer_of_the_captions
from testbed.sdxl import (
    SecondTask,
    first_tower,
    make_sdxl_unet,
    make_second_tower,
    norm_as_matrix,
    second_tokenizer,
    widened,
)
from testbed.sdxl_card import middle, sharpness
from testbed.sdxl_recipe import cut, enlarged, enlarged_from
from testbed.text import text_batch, tokens
from tests.testbed.test_base import BASE

SCENE = Scene((Thing("circle", "red"),), ("white",))


@pytest.fixture(scope="module")
def first() -> Any:
    return StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)


def _noise() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 4, 16, 16), torch.tensor([10, 300, 600, 950])


def test_the_denoiser_begins_as_the_first_base_whatever_else_it_is_told(first: Any) -> None:
    torch.manual_seed(1)
    unet = make_sdxl_unet().eval()
    unet.load_state_dict(widened(first.unet.state_dict()))
    (x, t), hidden = _noise(), torch.randn(4, 32, 128)
    added = {"text_embeds": torch.randn(4, 64), "time_ids": torch.randint(0, 99, (4, 6)).float()}
    with torch.inference_mode():
        theirs = first.unet(x, t, hidden).sample
        ours = unet(x, t, torch.cat([hidden, torch.randn(4, 32, 96)], 2), added_cond_kwargs=added).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_first_tower_is_the_first_bases_and_a_matrix_nearly_stands_in_for_its_norm(first: Any) -> None:
    tower = first_tower(first.text_encoder)
    said = ["a red star on a blue background", "a small dotted green ring at the top on a pink background", ""]
    ids = tokens(first.tokenizer, said * 8 + [f"a {c} moon on a white background" for c in ("red", "black", "cyan")])
    with torch.inference_mode():
        theirs = first.text_encoder(ids, output_hidden_states=True)
        ours = tower(ids, output_hidden_states=True)
        assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
        assert len(ours.hidden_states) == len(theirs.hidden_states) + 1
        fold = norm_as_matrix(tower, ids)
        off = ours.hidden_states[-2] @ fold - theirs.last_hidden_state
    assert off.square().mean() < 0.02 * theirs.last_hidden_state.square().mean()
    torch.manual_seed(2)
    unet = make_sdxl_unet().eval()
    unet.load_state_dict(widened(first.unet.state_dict(), fold))
    (x, t), states = _noise(), ours.hidden_states[-2][:4]
    added = {"text_embeds": torch.zeros(4, 64), "time_ids": torch.zeros(4, 6)}
    with torch.inference_mode():
        old = first.unet(x, t, theirs.last_hidden_state[:4]).sample
        new = unet(x, t, torch.cat([states, torch.zeros(4, 32, 96)], 2), added_cond_kwargs=added).sample
    assert (new - old).square().mean() < 0.01 * old.square().mean()


def test_the_second_tower_learns_what_sdxl_reads_of_it() -> None:
    """Gradients reach the last layer by the pooled text alone, and both kinds of states can be learned from."""
    torch.manual_seed(3)
    tokenizer = second_tokenizer(tokenizer_of_the_captions())
    task = SecondTask(make_second_tower(tokenizer))
    rng = np.random.default_rng(3)
    ids, target = text_batch(tokenizer, [SCENE] * 4, rng)
    assert ids[0, -1] == tokenizer.convert_tokens_to_ids("!")
    loss, right = task(ids, target, torch.Generator().manual_seed(0))
    loss.backward()
    assert 0 <= float(right) <= 1
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.pooled_heads.parameters())
    layers = {n: p.grad for n, p in task.encoder.named_parameters() if "fc1.weight" in n or "text_projection" in n}
    assert len(layers) == 4
    assert all(grad is not None and grad.abs().sum() > 0 for grad in layers.values())
    for parameter in [*task.pooled_heads.parameters(), *task.heads.parameters()]:
        parameter.data.mul_(float(parameter.shape[-1] == task.heads[0].weight.shape[1]))  # states are read, pooled not
    task.zero_grad()
    task(ids, target, torch.Generator().manual_seed(0))[0].backward()
    inner, last = (task.encoder.text_model.encoder.layers[i].mlp.fc1.weight.grad for i in (1, 2))
    assert inner.abs().sum() > 0
    assert last.abs().sum() == 0


def test_a_cut_says_where_it_is_from() -> None:
    """Where the thing is in the square, and where it was in the whole picture, tell the corner."""
    for seed in range(12):
        picture, (height, width, top, left, *target) = cut(SCENE, np.random.default_rng(seed))
        assert target == [64, 64]
        assert picture.size == (64, 64)
        scale = max(64, min(height, width)) / min(height, width)
        assert scale == 1  # the shorter side covers the square, or more than covers it once resized
        across = middle(picture)
        rng = np.random.default_rng(seed)
        short = 64 if rng.random() < 0.5 else int(rng.integers(65, 81))
        x, y = (side * short / 64 / 2 - corner for side, corner in ((width, left), (height, top)))
        radius = 0.29 * 1.07 * short
        if radius < x < 64 - radius and radius < y < 64 - radius:
            assert across == pytest.approx((x, y), abs=0.03 * short + 1.5)


def test_an_enlarged_picture_is_softer_the_smaller_it_was() -> None:
    picture, sizes = enlarged(SCENE, np.random.default_rng(0))
    assert picture.size == (64, 64)
    assert sizes == (sizes[0], sizes[0], 0, 0, 64, 64)
    assert 16 <= sizes[0] < 57
    whole = render(SCENE, np.random.default_rng(1))
    soft = [sharpness(p) for p in (enlarged_from(whole, 16), enlarged_from(whole, 32), whole)]
    assert soft[0] < soft[1] - 0.05 < soft[2] - 0.1


def test_the_middle_is_where_the_thing_is() -> None:
    pixels = np.full((64, 64, 3), 200, np.uint8)
    pixels[10:20, 40:50] = (20, 20, 220)
    assert middle(Image.fromarray(pixels)) == (45.0, 15.0)
