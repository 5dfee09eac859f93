"""Vectors of A1111, diffusers, ComfyUI and cog-sdxl, pickles among them, of which nothing is ever run."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer import generate, layouts, registry
from trainer.args import ModelArgs
from trainer.layouts import unpickled
from trainer.models import FAMILIES
from trainer.models.sd15 import SD15

CPU = torch.device("cpu")
ROWS = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
WIDE = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def sd15(tiny_base: Path) -> SD15:
    return SD15.load(ModelArgs(base=str(tiny_base)), CPU)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> Any:
    return registry.load(FAMILIES, "sdxl", "model.family").load(ModelArgs(base=str(tiny_sdxl)), CPU)


def a1111(vectors: Tensor) -> dict[str, Any]:
    """As AUTOMATIC1111 saves it: modules/textual_inversion."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": "me",
        "step": 500,
        "sd_checkpoint": "abc",
        "sd_checkpoint_name": None,
    }


@pytest.mark.parametrize(
    "held",
    [
        a1111(ROWS),
        a1111(nn.Parameter(ROWS)),
        a1111(torch.cat([ROWS, ROWS])[3:]),  # a view into more numbers
        a1111(ROWS.T.contiguous().T),  # strides
        {"<me>": ROWS},
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "bin"])
def test_a_saved_dictionary_is_read_without_running_it(
    sd15: SD15, tmp_path: Path, held: dict[str, Any], suffix: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    torch.save(held, path)
    assert layouts.is_embedding(path)
    (found,) = layouts.read_embedding(path, sd15).items()
    assert found[0] == "text_encoder"
    assert torch.equal(found[1], ROWS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_a_saved_dictionary(sd15: SD15, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"<me>": ROWS.to(dtype)[0]}, tmp_path / "x.bin")
    assert torch.equal(layouts.read_embedding(tmp_path / "x.bin", sd15)["text_encoder"], ROWS.to(dtype).float()[:1])


def test_safetensors_of_the_uis(sd15: SD15, sdxl: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for name in ("emb_params", "<me>"):
        save_file({name: ROWS}, path)
        assert torch.equal(layouts.read_embedding(path, sd15)["text_encoder"], ROWS)
    save_file({"clip_l": ROWS, "clip_g": WIDE}, path)
    found = layouts.read_embedding(path, sdxl)
    assert torch.equal(found["text_encoder"], ROWS)
    assert torch.equal(found["text_encoder_2"], WIDE)
    for tensors, family, said in (
        ({"clip_l": ROWS, "clip_g": WIDE}, sd15, "holds clip_g, clip_l; this base takes emb_params"),
        ({"emb_params": ROWS}, sdxl, "holds emb_params; this base takes clip_g, clip_l"),
        ({"emb_params": WIDE}, sd15, r"vectors of \[3, 24\], and the base's text_encoder takes \[n, 32\]"),
        ({"emb_params": ROWS / 0}, sd15, "NaN or infinite"),
    ):
        save_file(tensors, path)
        with pytest.raises(layouts.LayoutError, match=said):
            layouts.read_embedding(path, family)


def test_cog_sdxl_is_found_and_drawn_with(sdxl: Any, tiny_sdxl: Path, tmp_path: Path) -> None:
    """A folder of the trainer on Replicate: attention processors, embeddings.pti, special_params.json."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    generator = torch.Generator().manual_seed(1)
    lora = {f"{layer}.{end}.weight": torch.randn(*size, generator=generator) for end, size in SIZES.items()}
    save_file(lora, tmp_path / "lora.safetensors")
    save_file({"text_encoders_0": ROWS, "text_encoders_1": WIDE}, tmp_path / "embeddings.pti")
    (tmp_path / "special_params.json").write_text(json.dumps({"TOK": "<s0><s1>", "BAR": "<s2>"}))
    assert layouts.triggers_of(tmp_path / "embeddings.pti") == {"TOK": slice(0, 2), "BAR": slice(2, 3)}
    (tmp_path / "special_params.json").write_text(json.dumps({"ME": "<s0><s1><s2>"}))
    weights = generate.find(tmp_path)
    assert {trigger: found.file for trigger, found in weights.embeddings.items()} == {"ME": tmp_path / "embeddings.pti"}
    painter = generate.Painter(generate.base_of([weights], str(tiny_sdxl)), CPU)
    painter.use([generate.Weighted(painter.read(weights), generate.Strength(0.5, tokens=1.0))])
    prompts = ["a red ME", "a red circle"]
    hidden = painter.family.encode(prompts[:1]).hidden
    assert not torch.equal(hidden, sdxl.encode(prompts[:1]).hidden)
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = sdxl.denoiser.get_submodule(key).weight
    change = lora[f"{layer}.up.weight"] @ lora[f"{layer}.down.weight"]
    live = painter.family.denoiser.get_submodule(key).weight
    torch.testing.assert_close(live, weight + 0.5 * change, rtol=0, atol=1e-5)


SIZES = {"down": (2, 32), "up": (32, 2)}


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_nothing_of_a_hostile_file_runs(sd15: SD15, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    def refused(said: str) -> None:
        with pytest.raises(layouts.LayoutError, match=said) as caught:
            layouts.read_embedding(path, sd15)
        assert "\n" not in str(caught.value)

    torch.save({"<me>": ROWS, "x": Bomb(tmp_path / "ran")}, path)
    refused("more than tensors in it .*the name '_?io open'")
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refused("older pickles are not read")
    torch.save({"<me>": ROWS, "x": 3}, path)
    refused("1 things that are no vectors: x")
    torch.save([ROWS], path)
    refused("no dictionary of vectors")
    torch.save({"<me>": ROWS}, path, _use_new_zipfile_serialization=False)
    refused("older pickles are not read")
    torch.save({"<me>": ROWS}, path)
    whole = zipfile.ZipFile(path)
    held = {name: whole.read(name) for name in whole.namelist()}
    numbers, order = (next(name for name in held if name.endswith(end)) for end in ("data/0", "byteorder"))
    for said, method, change in (
        ("compressed", zipfile.ZIP_DEFLATED, {}),
        ("outside of its", zipfile.ZIP_STORED, {numbers: held[numbers][:-8]}),
        ("big-endian", zipfile.ZIP_STORED, {order: b"big"}),
    ):
        with zipfile.ZipFile(tmp_path / "y.pt", "w", method) as other:
            for name, data in {**held, **change}.items():
                other.writestr(name, data)
        with pytest.raises(layouts.LayoutError, match=said):
            unpickled.read(tmp_path / "y.pt")
    assert not (tmp_path / "ran").exists()


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    torch.save({"<me>": ROWS}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(layouts.LayoutError, match="is no zip"):
        unpickled.read(tmp_path / "x.pt")
