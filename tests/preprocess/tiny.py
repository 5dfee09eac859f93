"""Captioners of the real classes with tiny random weights, saved as their makers save them."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
    PreTrainedTokenizerFast,
)

WORDS = ("a", "red", "dog", "photo", "of", "what", "does", "the", "image", "describe", "in", "detail", "is", "shown")


def blip(folder: Path) -> Path:
    """A BLIP that says random words, the same for the same picture."""
    torch.manual_seed(0)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS, *string.ascii_lowercase[1:]]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}, bos_token="[DEC]")
    text = BlipTextConfig(
        vocab_size=len(vocab), hidden_size=16, encoder_hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, projection_dim=16, max_position_embeddings=64, bos_token_id=5, eos_token_id=3,
        sep_token_id=3, pad_token_id=0,
    )  # fmt: skip
    vision = BlipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        initializer_range=0.02,
    )  # fmt: skip
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    model = BlipForConditionalGeneration(config)
    lively(model)
    model.save_pretrained(folder)
    processor: Any = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    processor.save_pretrained(folder)
    return folder


def florence2(folder: Path) -> Path:
    """A Florence-2 that says random words, the same for the same picture."""
    torch.manual_seed(0)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    vocab = {word: i for i, word in enumerate([*specials, *WORDS, *string.ascii_letters.replace("a", "")])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    vision = Florence2VisionConfig(
        depths=[1, 1, 1, 1], embed_dim=[8, 8, 8, 8], num_heads=[1, 1, 1, 1], num_groups=[1, 1, 1, 1], window_size=2,
        projection_dim=16, max_temporal_embeddings=4, max_position_embeddings=8,
    )  # fmt: skip
    text = BartConfig(
        vocab_size=len(vocab), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=4)
    model = Florence2ForConditionalGeneration(config)
    lively(model)
    model.save_pretrained(folder)
    images: Any = CLIPImageProcessor(
        size={"height": 64, "width": 64}, do_center_crop=False, crop_size={"height": 64, "width": 64}
    )
    images.image_seq_length = 5
    tasks: dict[str, Any] = {"pure_text": {}, "polygons": {}, "phrase_grounding": {}, "ocr": {}}
    processor = Florence2Processor(images, tokenizer, post_processor_config=tasks)
    processor.save_pretrained(folder)
    return folder


def lively(model: torch.nn.Module) -> None:
    """Weights so large, above all those that look at the picture, that what is said depends on it."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(1000 if "crossattention.output" in name else 20)
