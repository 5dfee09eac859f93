"""Which layers are chosen, with which ranks, and how a wrong choice is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from torch import nn

from trainer.adapters.targets import MATRICES, NORMS, Target, choose
from trainer.args import AdapterArgs, ModelArgs
from trainer.models.sd15 import SD15
from trainer.types import BaseModelError


@pytest.fixture(scope="module")
def unet(tiny_base: Path) -> nn.Module:
    return SD15.load(ModelArgs(base=str(tiny_base)), torch.device("cpu")).denoiser


def chosen(root: nn.Module, takes: tuple[type[nn.Module], ...] = MATRICES, **options: Any) -> list[Target]:
    args = AdapterArgs.model_validate(options)
    return choose(root, args, "denoiser", takes=takes, ranked=args.kind == "lora")


def test_all_is_every_matrix_and_its_ends_are_narrow(unet: nn.Module) -> None:
    targets = {target.path: target for target in chosen(unet, targets="all")}
    assert set(targets) == {path for path, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "mid_block.resnets.0.time_emb_proj"} <= targets.keys()
    assert (targets["conv_out"].rank, targets["conv_out"].alpha) == (4, 4.0)
    assert {target.rank for path, target in targets.items() if path != "conv_out"} == {8}


def test_norm_is_every_norm(unet: nn.Module) -> None:
    paths = {target.path for target in chosen(unet, takes=(*MATRICES, *NORMS), kind="full", targets="norm")}
    assert paths == {path for path, m in unet.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}


def test_patterns_choose_leave_out_and_rank(unet: nn.Module) -> None:
    targets = chosen(
        unet,
        match=[r"mid_block.*to_[qk]$", "attn2.to_v"],
        exclude=["up_blocks"],
        ranks={"mid_block.*to_q": 3, "mid_block": 5},
        alphas={"to_v": 1.5},
    )
    assert targets
    for target in targets:
        assert "up_blocks" not in target.path
        assert target.path.endswith(("to_q", "to_k", "attn2.to_v"))
        middle = "mid_block" in target.path
        assert target.rank == (3 if middle and target.path.endswith("to_q") else 5 if middle else 8)
        assert target.alpha == (1.5 if target.path.endswith("to_v") else float(target.rank))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"match": ["mid_blok.*to_q"]}, r"adapter.match 'mid_blok.*to_q' matches no layer; near it are mid_block"),
        ({"exclude": ["nowhere"]}, "adapter.exclude 'nowhere' matches no layer"),
        ({"ranks": {"conv_in": 2}}, "adapter.ranks 'conv_in' matches no layer"),
        ({"alphas": {"x9": 2}}, "adapter.alphas 'x9' matches no layer"),
        ({"targets": "attention", "exclude": ["attn"]}, "leaves no layer"),
        ({"rank": 64}, r"above the layer's width in down_blocks\S+ \(rank 64, at most 32\)"),
        ({"targets": "norm"}, "changes Linear and Conv2d layers.*GroupNorm.*kind full"),
    ],
)
def test_what_is_wrong_is_named(unet: nn.Module, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BaseModelError, match=said):
        chosen(unet, **options)


def test_oft_takes_no_convolutions(unet: nn.Module) -> None:
    with pytest.raises(BaseModelError, match=r"kind oft changes Linear layers, and .* are Conv2d"):
        chosen(unet, takes=(nn.Linear,), kind="oft", targets="attention+ff+conv")


def test_b_lora_is_two_blocks_of_sdxl_and_is_refused_elsewhere(unet: nn.Module) -> None:
    sdxl = UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        transformer_layers_per_block=(1, 1, 2),
    )
    content = {target.path for target in chosen(sdxl, targets="b-lora-content")}
    style = {target.path for target in chosen(sdxl, targets="b-lora-style")}
    assert len(content) == len(style) == 2 * 8  # 2 transformer blocks, attn1 and attn2, 4 projections each
    assert all(path.startswith("up_blocks.0.attentions.0.") for path in content)
    assert all(path.startswith("up_blocks.0.attentions.1.") for path in style)
    assert {target.path for target in chosen(sdxl, targets="b-lora")} == content | style
    plain = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    with pytest.raises(BaseModelError, match=r"b-lora-content, but this denoiser has no content \(up_blocks.0"):
        chosen(plain, targets="b-lora-content")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "oft", "rank": 4}, "adapter.rank is 4, which does nothing for adapter.kind oft"),
        ({"kind": "full", "dropout": 0.1}, "adapter.dropout is 0.1, which does nothing for adapter.kind full"),
        ({"kind": "lora", "axis": "output"}, "adapter.axis .* does nothing"),
        ({"kind": "dora", "max_norm": 1.0}, "adapter.max_norm .* does nothing"),
        ({"kind": "loha", "lora_plus": 4}, "adapter.lora_plus .* does nothing"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"ranks": {"a": 0}}, "greater than or equal to 1"),
        ({"match": ["("]}, "is no regular expression"),
        ({"match": ["a"], "targets": "all"}, "choose one of them"),
        ({"text": {"rank": 4}}, "adapter.text.train is off"),
        ({"kind": "none", "text": {"train": True}}, "adapter.kind is none"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AdapterArgs.model_validate(options)


def test_a_saved_tree_is_read_again_for_every_kind() -> None:
    for kind in ("lora", "dora", "loha", "lokr", "oft", "full"):
        args = AdapterArgs.model_validate({"kind": kind})
        assert AdapterArgs.model_validate(args.model_dump(mode="json")) == args
        assert args.scaled_by_alpha == (kind not in ("oft", "full"))
