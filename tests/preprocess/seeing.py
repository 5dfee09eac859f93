"""Detectors, segmenters and upscalers of the real classes with tiny random weights, saved as their makers save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Swin2SRConfig,
    Swin2SRForImageSuperResolution,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

LABELS = {0: "wall", 1: "Person", 2: "dog"}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def yolos(folder: Path, side: int = 64) -> Path:
    """A detector that puts ten boxes somewhere, of labels that depend on the picture."""
    torch.manual_seed(3)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[side, side],
        patch_size=16, num_detection_tokens=10, id2label=LABELS, label2id={v: k for k, v in LABELS.items()},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    model.vit.embeddings.detection_tokens.data.normal_()
    _saved(model, folder, loud=6)
    with torch.no_grad():  # no label, and no box, is likelier than another before a picture is seen
        label, box = model.class_labels_classifier.layers[-1], model.bbox_predictor.layers[-1]
        label.weight.mul_(12)
        box.weight.mul_(12)
        label.bias.sub_(model(torch.zeros(1, 3, side, side)).logits[0].mean(0))
    model.save_pretrained(folder)
    size = {"shortest_edge": side, "longest_edge": side}
    YolosImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def segformer(folder: Path, side: int = 64) -> Path:
    torch.manual_seed(1)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, id2label=LABELS,
        label2id={v: k for k, v in LABELS.items()},
    )  # fmt: skip
    _saved(SegformerForSemanticSegmentation(config), folder, loud=8)
    size = {"height": side, "width": side}
    SegformerImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def mask2former(folder: Path, side: int = 64) -> Path:
    torch.manual_seed(4)
    swin = SwinConfig(
        image_size=side, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
    )  # fmt: skip
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6,
        id2label=LABELS, label2id={v: k for k, v in LABELS.items()},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    model.model.transformer_module.queries_features.weight.data.normal_()
    model.class_predictor.weight.data.mul_(20)
    _saved(model, folder, loud=8)
    size = {"height": side, "width": side}
    Mask2FormerImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def swin2sr(folder: Path, upscale: int = 2, window: int = 4) -> Path:
    torch.manual_seed(0)
    config = Swin2SRConfig(
        image_size=16, embed_dim=8, depths=[2], num_heads=[2], window_size=window, mlp_ratio=2.0, upscale=upscale,
        upsampler="pixelshuffledirect",
    )  # fmt: skip
    _saved(Swin2SRForImageSuperResolution(config), folder, loud=3)
    return folder


def _saved(model: Any, folder: Path, loud: float) -> None:
    """With matrices so large that what comes out depends on the picture."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(loud)
    model.save_pretrained(folder)
