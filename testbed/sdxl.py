"""Networks of SDXL's kind that begin as the first base's: two text towers and a denoiser told of sizes.

SDXL reads the states under a tower's last layer, which no norm has seen. The first tower is the first base's with
a third layer that adds nothing, so that its states there are those under the first base's last norm. The denoiser's
keys and values are widened by zeros for the second tower, and fitted to do without the norm.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from testbed.text import HEADS, LENGTH, WIDTH, attributes, ends
from testbed.unet import CHANNELS

WIDTH2 = 96  # of the second tower
POOLED = 64  # of its projection
SIZE_CHANNELS = 32  # of the sinusoids of each of the six sizes
PAD2 = "!"  # the second tokenizer's padding, as SDXL's


def second_tokenizer(first: CLIPTokenizer) -> CLIPTokenizer:
    """The first with SDXL's other padding."""
    second = copy.deepcopy(first)
    second.pad_token = PAD2
    return second


def first_tower(base: CLIPTextModel) -> CLIPTextModel:
    """The base's tower with a third layer that adds nothing: states under it are those under the base's last norm."""
    config = copy.deepcopy(base.config)
    config.num_hidden_layers += 1
    tower = CLIPTextModel(config)
    missing, unexpected = tower.load_state_dict(base.state_dict(), strict=False)
    if unexpected or not all(".layers.2." in name for name in missing):
        raise ValueError(f"the base's tower does not fit: {unexpected or missing}")
    for name, parameter in tower.named_parameters():
        if ".layers.2." in name and (".out_proj." in name or ".fc2." in name):
            nn.init.zeros_(parameter)
    return tower.eval()


def make_second_tower(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH2,
            intermediate_size=2 * WIDTH2,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=POOLED,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class SecondTask(nn.Module):
    """The second tower with throw-away heads on what SDXL takes of it: states under the last layer, pooled text."""

    def __init__(self, encoder: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList([nn.Linear(WIDTH2, len(names)) for names in HEADS.values()])
        self.pooled_heads = nn.ModuleList([nn.Linear(POOLED, len(names)) for names in HEADS.values()])

    def forward(self, ids: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(loss, share of attributes right) for ids [B, L] and target [B, heads]."""
        out = self.encoder(ids, output_hidden_states=True)
        hidden, rows = out.hidden_states[-2], torch.arange(len(ids))
        eos, later = ends(ids, self.encoder.config.eos_token_id, generator)
        read = [
            attributes(self.heads, hidden[rows, eos], target),
            attributes(self.heads, hidden[rows, later], target),
            attributes(self.pooled_heads, out.text_embeds, target),
        ]
        return torch.stack([loss for loss, _ in read]).mean(), torch.stack([right for _, right in read]).mean()


def make_sdxl_unet() -> UNet2DConditionModel:
    """The first base's denoiser with wider text, linear projections around attention, pooled text and sizes."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH + WIDTH2,
        attention_head_dim=tuple(c // 16 for c in CHANNELS),  # a count of heads, by an old slip of the name
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_CHANNELS,
        projection_class_embeddings_input_dim=6 * SIZE_CHANNELS + POOLED,
    )


def widened(base: dict[str, Tensor], fold: Tensor | None = None) -> dict[str, Tensor]:
    """The state of `make_sdxl_unet` that computes what the base's computes, whatever the second tower and sizes say.

    Args:
        base: the state of the first base's denoiser.
        fold: [D1, D1]; keys and values read `states @ fold` in place of states.
    """
    unet = make_sdxl_unet()
    state = {k: v.clone() for k, v in unet.state_dict().items()}
    for name in ("add_embedding.linear_2.weight", "add_embedding.linear_2.bias"):
        state[name].zero_()
    for name, old in base.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            state[name].zero_()
            state[name][:, : old.shape[1]] = old if fold is None else old @ fold.T
        else:
            state[name] = old.reshape(state[name].shape).clone()  # 1 x 1 convolutions become linear
    return state


@torch.no_grad()
def norm_as_matrix(tower: CLIPTextModel, ids: Tensor) -> Tensor:
    """[D, D]: the linear map that comes closest, over the tokens of ids [N, L], to the tower's last norm."""
    out = tower(ids, output_hidden_states=True)
    raw, normed = out.hidden_states[-2], out.last_hidden_state
    flat: list[Any] = [x.reshape(-1, x.shape[-1]).double() for x in (raw, normed)]
    return torch.linalg.lstsq(flat[0], flat[1]).solution.float()
