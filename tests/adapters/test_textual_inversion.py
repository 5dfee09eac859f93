"""Textual inversion: what the rows start from, where they act, and that all else is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from trainer import sampler
from trainer.adapters.similarity import mean_picture_feature
from trainer.adapters.textual_inversion import Concept, TextualInversion
from trainer.args import ModelArgs, TextArgs
from trainer.models.sd15 import SD15
from trainer.models.sdxl import SDXL
from trainer.types import BaseModelError

CPU = torch.device("cpu")


@pytest.fixture
def family(tiny_base: Path) -> SD15:
    return SD15.load(ModelArgs(base=str(tiny_base)), CPU)


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 32, 40, generator=generator) * 2 - 1 for _ in range(3)]


def attached(family: SD15, trigger: str = "TOK", **options: object) -> TextualInversion:
    inversion = TextualInversion(TextArgs(**{"tokens": 2, **options}), trigger, seed=0, pictures=pictures())
    inversion.attach(family)
    return inversion


def table(family: SD15) -> Tensor:
    return family.text_encoders["text_encoder"].state_dict()["embeddings.token_embedding.weight"]


def test_rows_stand_where_the_trigger_stands(family: SD15) -> None:
    weights = table(family).clone()
    words = family.tokenizers["text_encoder"]("a red star", add_special_tokens=False).input_ids
    expected = family.encode(["a photo of red star on a red background"]).hidden
    inversion = attached(family)
    inversion.load_state_dict({"text_encoder.rows": weights[words[1:]]})
    assert torch.equal(family.encode(["a photo of TOK on a red background"]).hidden, expected)


@pytest.mark.parametrize(
    ("trigger", "prompt", "expected"),
    [
        ("TOK", "a TOK, red", "a <concept-0><concept-1>, red"),
        ("TOK", "TOK and TOK", "<concept-0><concept-1> and <concept-0><concept-1>"),
        ("TOK", "TOKEN tok STOK", "TOKEN tok STOK"),
        ("a+b", "an a+b here", "an <concept-0><concept-1> here"),
        ("<rose>", "a <rose>", "a <concept-0><concept-1>"),
    ],
)
def test_the_trigger_is_replaced_as_a_word(family: SD15, trigger: str, prompt: str, expected: str) -> None:
    attached(family, trigger)
    assert family.expand(prompt) == expected
    assert family.expand(expected) == expected


def test_only_the_rows_get_a_gradient(family: SD15) -> None:
    inversion = TextualInversion(TextArgs(tokens=2), "TOK", seed=0)
    ((name, rows),) = inversion.attach(family)
    assert (name, rows.dtype, tuple(rows.shape)) == ("text_encoder.rows", torch.float32, (2, 32))
    family.encode(["a TOK", "a star"]).hidden.square().sum().backward()
    assert rows.grad is not None
    assert bool((rows.grad != 0).any(dim=1).all())
    assert [p for p in family.text_encoders["text_encoder"].parameters() if p.requires_grad] == [rows]


def test_prompts_without_the_trigger_are_untouched_and_detach_restores(family: SD15) -> None:
    prompts = ["a red star", "a TOK", "a <concept-0>"]
    before, tokenizer = family.encode(prompts).hidden, family.tokenizers["text_encoder"]
    size = len(tokenizer)
    inversion = attached(family)
    assert torch.equal(family.encode(prompts[:1]).hidden, before[:1])
    assert not torch.equal(family.encode(prompts[1:2]).hidden, before[1:2])
    with inversion.disabled():
        assert torch.equal(family.encode(prompts[:2]).hidden, before[:2])
    assert not torch.equal(family.encode(prompts[1:2]).hidden, before[1:2])
    inversion.detach()
    assert family.tokenizers["text_encoder"] is tokenizer
    assert len(tokenizer) == size
    assert family.prompt_rules == []
    assert torch.equal(family.encode(prompts).hidden, before)


def test_the_pipeline_reads_the_rows_too(family: SD15) -> None:
    attached(family)
    pipe = family.pipeline()
    expected, _ = pipe.encode_prompt(family.expand("a TOK on a blue background"), CPU, 1, False)
    torch.testing.assert_close(family.encode(["a TOK on a blue background"]).hidden, expected)


def test_rows_keep_the_dtype_of_the_base_outside(tiny_base: Path) -> None:
    half = SD15.load(ModelArgs(base=str(tiny_base), dtype="bf16"), CPU)
    inversion = attached(half)
    assert inversion.rows()["text_encoder"].dtype == torch.float32
    assert half.encode(["a TOK"]).hidden.dtype == torch.bfloat16


@pytest.mark.parametrize(("base", "kind"), [("tiny_base", SD15), ("tiny_sdxl", SDXL)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_base_in_half_precision_draws_with_rows_in_full(
    base: str, kind: type[SD15 | SDXL], dtype: str, request: pytest.FixtureRequest
) -> None:
    """diffusers gives a prompt's states the precision of the text encoder's first parameter."""
    family = kind.load(ModelArgs.model_validate({"base": str(request.getfixturevalue(base)), "dtype": dtype}), CPU)
    before = {key: tower.dtype for key, tower in family.text_encoders.items()}
    adapter = TextualInversion(TextArgs(tokens=2), [Concept("TOK")], 0)
    rows = adapter.attach(family)
    assert {parameter.dtype for _, parameter in rows} == {torch.float32}
    assert {key: tower.dtype for key, tower in family.text_encoders.items()} == before
    (picture,) = sampler.generate(family, ["a TOK"], seeds=[0], steps=1, guidance=2.0)
    assert picture.getextrema() != ((0, 0),) * 3


def test_random_start_has_the_tables_std_and_follows_the_seed(family: SD15) -> None:
    rows = [TextualInversion(TextArgs(tokens=3), "TOK", seed=s)._start("text_encoder", family) for s in (1, 1, 2)]
    target = table(family).std(dim=1).mean()
    torch.testing.assert_close(rows[0].std(dim=1), target.expand(3))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_words_start_is_their_mean(family: SD15) -> None:
    ids = family.tokenizers["text_encoder"]("red star", add_special_tokens=False).input_ids
    expected = table(family)[ids].mean(dim=0)
    inversion = attached(family, init="words", init_words="red star")
    assert torch.equal(inversion.rows()["text_encoder"], expected.expand(2, -1))


def cosine_to_pictures(family: SD15, base: Path, rows: Tensor) -> float:
    """Between "a photo of TOK" and the pictures, computed by transformers' own CLIP methods on a grown table."""
    clip = CLIPModel.from_pretrained(base / "clip", dtype=torch.float32).eval()
    grown = torch.nn.Embedding.from_pretrained(torch.cat([clip.text_model.get_input_embeddings().weight, rows]))
    clip.text_model.set_input_embeddings(grown)
    vocab = grown.num_embeddings - len(rows)
    ids = family.tokenizers["text_encoder"]("a photo of").input_ids
    ids = torch.tensor([[*ids[:-1], *range(vocab, vocab + len(rows)), ids[-1]]])
    pixels = torch.stack(
        [F.interpolate(p[None, :, :, 4:36], (16, 16), mode="bicubic", antialias=True)[0] for p in pictures()]
    )
    with torch.no_grad():
        images = F.normalize(clip.get_image_features(pixel_values=pixels.clamp(-1, 1)).pooler_output, dim=-1).mean(0)
        hidden = clip.text_model(ids)[0][:, -1]
        return float(F.cosine_similarity(clip.text_projection(hidden), images[None]))


def test_similarity_start_comes_close_to_the_pictures(family: SD15, tiny_base: Path) -> None:
    start = attached(family, init="random")
    random = start.rows()["text_encoder"].clone()
    start.detach()
    moved = attached(family, init="similarity").rows()["text_encoder"]
    before, after = (cosine_to_pictures(family, tiny_base, rows) for rows in (random, moved))
    assert after > before + 0.2
    std = table_std(family)
    assert bool(((moved.std(dim=1) / std - 1).abs() < 0.5).all())
    again = SD15.load(ModelArgs(base=str(tiny_base)), CPU)
    assert torch.equal(attached(again, init="similarity").rows()["text_encoder"], moved)


def test_pictures_reach_the_clip_as_its_processor_says(tiny_base: Path, tmp_path: Path) -> None:
    clip = CLIPModel.from_pretrained(tiny_base / "clip", dtype=torch.float32).eval()
    wide = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def feature(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return F.normalize(clip.get_image_features(pixel_values=pixels[None]).pooler_output, dim=-1)

    square = wide[:, :, 4:20]
    torch.testing.assert_close(mean_picture_feature(clip, tiny_base / "clip", [wide]), feature(square))
    torch.testing.assert_close(mean_picture_feature(clip, tmp_path, [square]), feature(square))
    both = (feature(square) + feature(-square)) / 2
    torch.testing.assert_close(mean_picture_feature(clip, tmp_path, [square, -square]), both)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    mean, std = torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1)
    expected = feature(((square + 1) / 2 - mean) / std)
    torch.testing.assert_close(mean_picture_feature(clip, tmp_path, [square]), expected)


def table_std(family: SD15) -> Tensor:
    return family.text_encoders["text_encoder"].get_input_embeddings().table.weight.std(dim=1).mean()


def test_similarity_start_without_a_clip_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("clip"))
    family = SD15.load(ModelArgs(base=str(base)), CPU)
    with pytest.raises(BaseModelError, match="has no CLIP"):
        attached(family, init="similarity")
    assert family.prompt_rules == []


def test_penalty_is_the_relative_distance_from_the_tables_std(family: SD15) -> None:
    inversion = attached(family, std_weight=0.5)
    rows = inversion.rows()["text_encoder"]
    penalty = inversion.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.0, abs=1e-6)
    rows.mul_(3.0)
    penalty = inversion.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.5 * 4.0, rel=1e-4)
    penalty.backward()
    inversion.detach()
    assert attached(family, std_weight=0.0).penalty() is None


def test_state_goes_to_another_instance(family: SD15, tiny_base: Path) -> None:
    saved = {name: rows.clone() for name, rows in attached(family).state_dict().items()}
    other = TextualInversion(TextArgs(tokens=2), "TOK", seed=9)
    other.attach(SD15.load(ModelArgs(base=str(tiny_base)), CPU))
    other.load_state_dict(saved)
    assert torch.equal(other.state_dict()["text_encoder.rows"], saved["text_encoder.rows"])
    with pytest.raises(ValueError, match="has shape"):
        other.load_state_dict({"text_encoder.rows": torch.zeros(3, 32)})
