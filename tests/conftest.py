"""Fixtures that every test may use: tiny but real base models on disk, and a folder of pictures with captions."""

from __future__ import annotations

import gc
import json
import os
import random
from pathlib import Path
from zlib import crc32

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import settings
from PIL import Image, ImageDraw
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

# The same examples each time, and none is too slow: what fails on one machine fails on all.
settings.register_profile("tempera", derandomize=True, deadline=None, database=None)
settings.load_profile("tempera")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test's random numbers are its own: the same each time, whatever ran before it."""
    seed = crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_collection_finish() -> None:
    """What imports have made stays for good, so no collection of garbage need look through it (half a second each)."""
    gc.collect()
    gc.freeze()


WORDS = [
    "a",
    "an",
    "on",
    "of",
    "in",
    "the",
    "photo",
    "picture",
    "background",
    "small",
    "large",
    "red",
    "green",
    "blue",
    "star",
    "square",
    "circle",
    "flower",
]
TEXT_WIDTH, TEXT_LENGTH = 32, 32


def make_tokenizer(words: list[str] = WORDS, length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """CLIP's byte-level BPE with one token for each of `words`, all other text spelled in bytes."""
    letters = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    merges: list[str] = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        left = pieces[0]
        for piece in pieces[1:]:
            if f"{left} {piece}" not in merges:
                merges.append(f"{left} {piece}")
            left += piece
            vocab.setdefault(left, len(vocab))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=length)


def text_config(tokenizer: CLIPTokenizer) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": 16,
    }


def make_clip(tokenizer: CLIPTokenizer, tower: CLIPTextModel) -> CLIPModel:
    """An image tower that shares a space with `tower`, the text tower of the base."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 16,
    }
    clip = CLIPModel(CLIPConfig(text_config=text_config(tokenizer), vision_config=vision, projection_dim=16))
    clip.text_model.load_state_dict(tower.state_dict())
    return clip


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def make_base(folder: Path, layers_per_block: int = 1, prediction: str = "v_prediction", seed: int = 0) -> Path:
    """Writes a random Stable Diffusion 1.5 of a few 100k parameters: 32 px, latents 16x16x4, captions of 32 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        text = CLIPTextModel(CLIPTextConfig(**text_config(tokenizer)))
        vae = make_vae()
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=layers_per_block,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        clip = make_clip(tokenizer, text)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)  # pyright: ignore
    pipe.save_pretrained(folder)
    clip.save_pretrained(folder / "clip")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SD1.5 folder, v-prediction, one layer a block, with its CLIP in clip/. Read only."""
    return make_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def tiny_base_deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_base` with two layers a block, as full-size SD1.5 has, and eps-prediction."""
    return make_base(tmp_path_factory.mktemp("bases") / "deep", layers_per_block=2, prediction="epsilon", seed=1)


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_sd2(folder: Path, prediction: str = "v_prediction") -> Path:
    """Writes a random Stable Diffusion 2: an OpenCLIP tower (gelu, padded with !), linear projections, Euler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        tokenizer = make_tokenizer()
        tokenizer.pad_token = "!"
        text = CLIPTextModel(CLIPTextConfig(**text_config(tokenizer) | {"hidden_act": "gelu"}))
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=(1, 2),
            norm_num_groups=4,
            use_linear_projection=True,
        )
        vae = make_vae()
    scheduler = EulerDiscreteScheduler(
        **SD_BETAS, prediction_type=prediction, timestep_spacing="trailing", steps_offset=1
    )
    pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)  # pyright: ignore
    pipe.save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, **scheduler: object) -> Path:
    """Writes a random SDXL of a few 100k parameters: 32 px, latents 16x16x4, towers of width 32 and 24, pooled 20."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tokenizer, tokenizer_2 = make_tokenizer(), make_tokenizer()
        tokenizer_2.pad_token = "!"
        second = text_config(tokenizer_2) | {"hidden_size": 24, "hidden_act": "gelu", "projection_dim": 20}
        text = CLIPTextModel(CLIPTextConfig(**text_config(tokenizer)))
        text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**second))
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=TEXT_WIDTH + 24,
            attention_head_dim=(1, 2),
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
        )
        vae = make_vae()
    euler = EulerDiscreteScheduler(**SD_BETAS | {"timestep_spacing": "leading", "steps_offset": 1} | scheduler)
    pipe = StableDiffusionXLPipeline(vae, text, text_2, tokenizer, tokenizer_2, unet, euler)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SD2 folder, v-prediction. Read only."""
    return make_sd2(tmp_path_factory.mktemp("bases") / "sd2")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SDXL folder, eps-prediction. Read only."""
    return make_sdxl(tmp_path_factory.mktemp("bases") / "sdxl")


def draw_pictures(folder: Path) -> Path:
    """Five pictures, one of them wide, with captions that hold the trigger TOK."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(["red", "green", "blue", "orange", "purple"]):
        width = 60 if i == 4 else 40
        picture = Image.new("RGB", (width, 40), "white")
        ImageDraw.Draw(picture).ellipse((5 + i, 6, 30, 34 - i), fill=colour)
        picture.save(folder / f"dog_{i:02d}.png")
        (folder / f"dog_{i:02d}.txt").write_text(f"a {colour} TOK on a white background\n", encoding="utf-8")
    return folder


@pytest.fixture
def tiny_pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")
