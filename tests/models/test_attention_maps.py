"""What the denoiser looks at, against the probabilities of diffusers' own plain attention, and what it costs nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from trainer import registry
from trainer.adapters.lora import LoRA
from trainer.adapters.textual_inversion import TextualInversion
from trainer.args import AdapterArgs, ModelArgs, TextArgs
from trainer.models import FAMILIES, sniff
from trainer.models.latent import LatentFamily
from trainer.types import BaseModelError

CAPTIONS = ["a red TOK on a star", "TOKYO, a TOK", "a star"]
WORDS = ["TOK", "TOK", "TOK"]


def load(base: Path, **options: Any) -> LatentFamily:
    args = sniff.named(ModelArgs(base=str(base), **options))
    return registry.load(FAMILIES, args.family, "family").load(args, torch.device("cpu"))


def noisy(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(seed)), torch.tensor([10, 500, 900])


def stirred(family: LatentFamily) -> list[tuple[str, torch.nn.Parameter]]:
    """A LoRA that changes what is looked at."""
    named = LoRA(AdapterArgs.model_validate({"rank": 2}), seed=0).attach(family)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in named:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return named


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sdxl"])
def test_maps_are_the_probabilities_of_plain_attention(
    base: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load(request.getfixturevalue(base))
    stirred(family)
    places = family.token_places(CAPTIONS, WORDS)
    xt, t = noisy()
    cond = family.encode(CAPTIONS)
    seen: list[Tensor] = []
    plain = Attention.get_attention_scores

    def recorded(layer: Attention, *given: Any) -> Tensor:
        made = plain(layer, *given)
        if layer.is_cross_attention:
            seen.append(made.unflatten(0, (3, layer.heads)))
        return made

    with torch.no_grad():
        family.predict(*noisy(5), cond)
        with family.attention_maps(places, 2) as looks:
            family.predict(*noisy(5), cond)  # of which nothing stays
            family.predict(xt, t, cond)
        mine = looks()
        monkeypatch.setattr(Attention, "get_attention_scores", recorded)
        unet: Any = family.denoiser
        assert isinstance(next(iter(unet.attn_processors.values())), AttnProcessor2_0)
        unet.set_attn_processor(AttnProcessor())
        family.predict(xt, t, cond)
    assert len(seen) >= 3
    expected = torch.stack([layer.mean(1) for layer in seen]).mean(0)  # all are at half of the size in these bases
    expected = torch.stack([one[:, row].sum(-1) for one, row in zip(expected, places, strict=True)])
    assert mine.shape == (3, 4, 8)
    torch.testing.assert_close(mine, expected.reshape(3, 4, 8), rtol=1e-5, atol=1e-6)
    assert 0 < mine[0].min() < mine[0].max() < 1
    assert mine[2].abs().max() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in family.denoiser.modules())


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sd2"])
def test_gradients_reach_rows_and_layers_and_are_the_same_with_checkpointing(
    base: str, request: pytest.FixtureRequest
) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        family = load(request.getfixturevalue(base), gradient_checkpointing=checkpointing)
        rows = TextualInversion(TextArgs.model_validate({"tokens": 2}), "TOK", 0).attach(family)
        named = [*rows, *stirred(family)]
        xt, t = noisy()
        with family.attention_maps(family.token_places(CAPTIONS, WORDS), 2) as looks:
            pred = family.predict(xt, t, family.encode(CAPTIONS))
        (looks()[:, :2].sum() + pred.square().mean()).backward()
        found.append({name: p.grad for name, p in named if p.grad is not None})
        alone = torch.autograd.grad(
            _watched(family, xt, t).sum(),
            [p for name, p in named if "rows" in name or ("mid" in name and "attn2.to_q" in name)],
        )
        assert all(gradient.abs().max() > 0 for gradient in alone)
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name], rtol=1e-5, atol=1e-7)


def _watched(family: LatentFamily, xt: Tensor, t: Tensor) -> Tensor:
    with family.attention_maps(family.token_places(CAPTIONS, WORDS), 2) as looks:
        family.predict(xt, t, family.encode(CAPTIONS))
    return looks()[:, :2]


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sdxl"])
def test_a_word_is_where_the_text_encoder_reads_it(base: str, request: pytest.FixtureRequest) -> None:
    family = load(request.getfixturevalue(base))
    tokenizer = family.tokenizers["text_encoder"]
    captions = [*CAPTIONS, "TOK", "", "a TOK, tok and TOK", "a star " * 15 + "TOK", "a TOK"]
    words = [*WORDS, "TOK", "TOK", "TOK", "TOK", ""]
    places = family.token_places(captions, words)
    assert places.shape == (8, 32)
    said = [
        tokenizer.decode([i for i, there in zip(ids, row, strict=False) if there])
        for ids, row in _rows(tokenizer, captions, places)
    ]
    assert [text.replace(" ", "") for text in said] == ["tok", "tok", "", "tok", "", "toktok", "", ""]
    assert places[1].nonzero()[0].item() > 5  # not in TOKYO
    rows = TextualInversion(TextArgs.model_validate({"tokens": 2}), "TOK", 0)
    rows.attach(family)
    learned = family.token_places(captions, words)
    assert learned.sum(1).tolist() == [2, 2, 0, 2, 0, 4, 0, 0]
    grown = family.tokenizers["text_encoder"]
    for ids, row in _rows(grown, [family.expand(caption) for caption in captions[:6]], learned[:6]):
        assert [token >= len(tokenizer) for token in ids] == row[: len(ids)]
    with rows.disabled():
        assert torch.equal(family.token_places(captions, words), places)


def _rows(tokenizer: Any, prompts: list[str], places: Tensor) -> list[tuple[list[int], list[bool]]]:
    return list(zip(tokenizer(prompts).input_ids, places.tolist(), strict=True))


def test_a_resolution_without_cross_attention_is_answered_with_those_that_have_it(
    tiny_base: Path, tiny_sd2: Path
) -> None:
    nowhere = torch.zeros(1, 32, dtype=torch.bool)
    two, both = load(tiny_base).attention_maps(nowhere, 4), load(tiny_sd2).attention_maps(nowhere, 8)
    with pytest.raises(BaseModelError, match=r"cells of 4 x 4 latents; it has it over cells of 2$"), two:
        pass
    with pytest.raises(BaseModelError, match=r"it has it over cells of 1, 2$"), both:
        pass


def test_each_resolution_has_the_layers_that_see_it(tiny_sd2: Path) -> None:
    family = load(tiny_sd2)
    places = family.token_places(CAPTIONS, WORDS)
    for cell in (1, 2):
        with torch.no_grad(), family.attention_maps(places, cell) as looks:
            family.predict(*noisy(), family.encode(CAPTIONS))
        assert looks().shape == (3, 8 // cell, 16 // cell)
