"""Exported files in the stock pipelines of diffusers draw what the trainer's sampler draws, on the pretrained bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compatibility
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from trainer import export as exporting
from trainer import registry, sampler
from trainer.adapters import ADAPTERS
from trainer.adapters.textual_inversion import TextualInversion
from trainer.args import ModelArgs, TrainArgs
from trainer.models import FAMILIES
from trainer.types import Adapter, ModelFamily

ROOT = Path(__file__).parents[1]
BASES = {"sd15": ROOT / "testbed" / "base", "sdxl": ROOT / "testbed" / "base-sdxl"}
LOADED: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"rank": 4, "alpha": 2.0}},
    "locon": {"adapter": {"rank": 4, "alpha": 2.0, "targets": "attention+ff+conv"}},
    "dora-rows": {"adapter": {"kind": "dora", "rank": 4, "axis": "output"}},
    "encoders": {"adapter": {"rank": 4, "alpha": 2.0, "text": {"train": True, "targets": "all"}}},
    "rows": {"adapter": {"kind": "none"}, "text": {"tokens": 2}},
}
FILES = {"dora-rows": "pytorch_lora_weights.safetensors"}  # the others are drawn from kohya's
STEPS, GUIDANCE, SEED = 2, 2.0, 3


@pytest.fixture(scope="module", params=BASES)
def both(request: pytest.FixtureRequest) -> tuple[ModelFamily, Any]:
    """A family, and the stock pipeline of its base."""
    base = str(BASES[request.param])
    family = registry.load(FAMILIES, request.param, "family").load(ModelArgs(base=base), torch.device("cpu"))
    pipe: Any = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return family, pipe


def trained(family: ModelFamily, args: TrainArgs) -> list[Adapter]:
    adapters: list[Adapter] = []
    if args.text.tokens:
        adapters.append(TextualInversion(args.text, "TOK", seed=0))
    if args.adapter.kind != "none":
        kind = registry.load(ADAPTERS, args.adapter.kind, "adapter.kind")
        adapters.append(kind(args.adapter, 0))
        if args.adapter.text.train:
            adapters.append(kind(args.adapter.for_text(), 1, "text"))
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters:
        adapter.attach(family)
        for tensor in adapter.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return adapters


def drawn(pipe: Any, prompt: str, side: int) -> np.ndarray[Any, Any]:
    generator = torch.Generator().manual_seed(SEED)
    options = {"negative_prompt": "", "guidance_scale": GUIDANCE, "num_inference_steps": STEPS}
    return array(pipe(prompt, **options, width=side, height=side, generator=generator).images[0])


def array(picture: Any) -> np.ndarray[Any, Any]:
    return np.asarray(picture.convert("RGB"), dtype=np.int16)


def load(pipe: Any, folder: Path, kind: str, family: ModelFamily) -> str:
    """The prompt to draw with what was loaded."""
    if kind != "rows":
        pipe.load_lora_weights(folder, weight_name=FILES.get(kind, "run.safetensors"))
        return "a photo of TOK"
    vectors = load_file(folder / "run_embedding.safetensors")
    for encoder, key in family.clients.embeddings.items():
        tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
        pipe.load_textual_inversion(
            vectors[key], token="<tok>", text_encoder=getattr(pipe, encoder), tokenizer=tokenizer
        )
    return "a photo of <tok>"


@pytest.mark.parametrize("kind", LOADED)
def test_the_stock_pipeline_draws_the_trainers_picture(
    both: tuple[ModelFamily, Any], kind: str, tmp_path: Path
) -> None:
    family, pipe = both
    layouts = ["embedding"] if kind == "rows" else ["kohya", "diffusers"]
    tree = {"data": {"source": "pictures"}, "export": {"layouts": layouts}, **LOADED[kind]}
    args = TrainArgs.model_validate(tree)
    plain = drawn(pipe, "a photo of TOK", family.resolution)
    adapters = trained(family, args)
    try:
        exporting.export(tmp_path, "run", family, adapters, args)
        own = sampler.generate(family, ["a photo of TOK"], seeds=[SEED], steps=STEPS, guidance=GUIDANCE)
    finally:
        for adapter in reversed(adapters):
            adapter.detach()
    prompt = load(pipe, tmp_path, kind, family)
    stock = drawn(pipe, prompt, family.resolution)
    if kind != "rows":
        pipe.unload_lora_weights()
    else:
        pipe.unload_textual_inversion()
    assert abs(stock - array(own[0])).max() <= 1  # of 255; all ten were equal where this was written
    assert abs(plain - stock).max() > 8


def test_the_table_says_what_was_run() -> None:
    kinds = {"dora-rows": "dora-rows", "rows": "rows"}
    run = {kinds.get(kind, "lora") for kind in LOADED}
    for family in BASES:
        assert set(compatibility.BY_DIFFUSERS[family]) == run | {"model"}


def test_the_table_is_current() -> None:
    page = compatibility.PAGE.read_text(encoding="utf-8")
    assert compatibility.written(page) == page, "run python tests/compatibility.py"
