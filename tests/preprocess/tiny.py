"""Captioners of the real classes with tiny random weights, saved as their makers save them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
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
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
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


CHAT = ("<pad>", "<s>", "</s>", "<unk>", "<start>", "<image>", "<video>", "<end>")
QWEN_TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}<start><image><end>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<s> says{% endif %}"
)
JOY_TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role }} {% if m.role == 'user' %}<start><image><end>{{ m.content.strip() }}"
    "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %} says{% endif %}"
)


def chat_tokenizer(template: str, extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Words and letters; it puts <s> first when it is asked for special tokens, as Llama's does."""
    vocab = {word: i for i, word in enumerate([*CHAT, *WORDS, *string.ascii_letters.replace("a", ""), *extra])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens=["<start>", "<image>", "<video>", "<end>"], chat_template=template,
    )  # fmt: skip


def _qwen_text(words: int) -> dict[str, Any]:
    return {
        "vocab_size": words, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip


def _qwen(folder: Path, model: Any, patch_size: int) -> Path:
    lively(model)
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=patch_size, merge_size=2, min_pixels=4 * 4 * patch_size**2).save_pretrained(
        folder
    )
    chat_tokenizer(QWEN_TEMPLATE).save_pretrained(folder)
    return folder


_SPECIAL = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 4, "vision_end_token_id": 7}


def qwen25(folder: Path) -> Path:
    """A Qwen2.5-VL that says random words, the same for the same picture."""
    torch.manual_seed(0)
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
        "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    words = len(chat_tokenizer(QWEN_TEMPLATE))
    config = Qwen2_5_VLConfig(text_config=_qwen_text(words), vision_config=vision, **_SPECIAL)
    return _qwen(folder, Qwen2_5_VLForConditionalGeneration(config), 14)


def qwen3(folder: Path) -> Path:
    """A Qwen3-VL that says random words, the same for the same picture."""
    torch.manual_seed(0)
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
    }  # fmt: skip
    text = {**_qwen_text(len(chat_tokenizer(QWEN_TEMPLATE))), "head_dim": 8}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_SPECIAL)
    return _qwen(folder, Qwen3VLForConditionalGeneration(config), 16)


def joycaption(folder: Path) -> Path:
    """A Llava of SigLIP and Llama that says random words, the same for the same picture."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(JOY_TEMPLATE)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=5, image_seq_length=4,
        vision_feature_select_strategy="full", vision_feature_layer=-2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    lively(model)
    model.save_pretrained(folder)
    images: Any = SiglipImageProcessor(size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="full", image_token="<image>",
        chat_template=JOY_TEMPLATE,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def lively(model: torch.nn.Module) -> None:
    """Weights so large, above all those that look at the picture, that what is said depends on it."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(1000 if "crossattention.output" in name else 20)
