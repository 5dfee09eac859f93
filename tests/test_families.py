"""What is trained on SDXL and SD2, from the command line to what programs load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from trainer import export as exporting
from trainer.adapters.lora import LoRA
from trainer.adapters.textual_inversion import TextualInversion
from trainer.args import ModelArgs, TextArgs, TrainArgs
from trainer.models import sniff
from trainer.models.sdxl import SDXL
from trainer.rundir import RunDir, read_jsonl
from trainer.types import Cond

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
PROMPT = "a photo of TOK on a red background"


def arguments(base: Path, **sections: Any) -> TrainArgs:
    return TrainArgs.model_validate(
        {
            "data": {"source": "pictures", "trigger": "TOK"},
            "model": {"base": str(base)},
            "adapter": {"rank": 3, "alpha": 7.5, "targets": "attention+ff+conv"},
            "text": {"tokens": 2},
            "export": {"layouts": ["kohya", "diffusers", "embedding"]},
            **sections,
        }
    )


def fresh(base: Path) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_output(unet: torch.nn.Module) -> Tensor:
    """In the UNet's own precision."""
    draw, dtype = torch.Generator().manual_seed(0), next(unet.parameters()).dtype
    text = torch.randn(1, 20, generator=draw).to(dtype)
    added = {"text_embeds": text, "time_ids": torch.tensor([[32.0, 48, 0, 0, 32, 48]])}
    xt, hidden = (torch.randn(shape, generator=draw).to(dtype) for shape in ((1, 4, 16, 24), (1, 32, 56)))
    with torch.no_grad():
        return unet(xt, torch.tensor([500]), hidden, added_cond_kwargs=added, return_dict=False)[0]


def disturbed(state: dict[str, Tensor], size: float) -> None:
    draw = torch.Generator().manual_seed(5)
    for tensor in state.values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * size)


@pytest.mark.parametrize("file", ["run.safetensors", "pytorch_lora_weights.safetensors"])
def test_diffusers_loads_sdxl_loras_exactly(tiny_sdxl: Path, tmp_path: Path, file: str) -> None:
    args = arguments(tiny_sdxl)
    family = SDXL.load(args.model, CPU)
    plain = unet_output(family.denoiser)
    lora = LoRA(args.adapter, seed=0)
    lora.attach(family)
    disturbed(lora.state_dict(), 0.3)
    exporting.export(tmp_path, "run", family, [lora], args)
    pipe = fresh(tiny_sdxl)
    pipe.load_lora_weights(tmp_path, weight_name=file)
    live, loaded = (unet_output(unet.double()) for unet in (family.denoiser, pipe.unet))  # else each rounds its own way
    assert (live - plain).abs().max() > 0.1
    torch.testing.assert_close(loaded, live, rtol=1e-6, atol=1e-6)


def test_sdxl_loras_are_in_the_names_of_the_first_release(tiny_sdxl: Path, tmp_path: Path) -> None:
    args = arguments(tiny_sdxl)
    family = SDXL.load(args.model, CPU)
    lora = LoRA(args.adapter, seed=0)
    lora.attach(family)
    exporting.export(tmp_path, "run", family, [lora], args)
    keys = set(load_file(tmp_path / "run.safetensors"))
    assert "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k.lora_down.weight" in keys
    assert not any("down_blocks" in key or "up_blocks" in key or "mid_block." in key for key in keys)


# --- textual inversion


def inverted(family: SDXL) -> TextualInversion:
    inversion = TextualInversion(TextArgs.model_validate({"tokens": 2}), "TOK", seed=3)
    inversion.attach(family)
    disturbed(inversion.state_dict(), 0.5)
    return inversion


def encoded(pipe: Any, prompt: str) -> Cond:
    hidden, _, pooled, _ = pipe.encode_prompt(prompt, device=CPU, do_classifier_free_guidance=False)
    return Cond(hidden, pooled)


def test_rows_of_both_towers_learn(tiny_sdxl: Path) -> None:
    family = SDXL.load(ModelArgs.model_validate({"base": str(tiny_sdxl)}), CPU)
    named = dict(TextualInversion(TextArgs.model_validate({"tokens": 2}), "TOK", seed=3).attach(family))
    assert {name: tuple(rows.shape) for name, rows in named.items()} == {
        "text_encoder.rows": (2, 32),
        "text_encoder_2.rows": (2, 24),
    }
    cond = family.encode(["a TOK"])
    assert cond.pooled is not None
    cond.pooled.square().sum().backward(retain_graph=True)
    assert named["text_encoder.rows"].grad is None, "the first tower has no part in the pooled vector"
    assert bool(named["text_encoder_2.rows"].grad.abs().sum(1).all())  # pyright: ignore
    cond.hidden.square().sum().backward()
    assert bool(named["text_encoder.rows"].grad.abs().sum(1).all())  # pyright: ignore


def test_the_notes_code_gives_diffusers_the_familys_own_encoding(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tiny_sdxl)
    family = SDXL.load(args.model, CPU)
    inversion, lora = inverted(family), LoRA(args.adapter, seed=0)
    lora.attach(family)
    exporting.export(tmp_path, "run", family, [inversion, lora], args)
    vectors = load_file(tmp_path / "run_embedding.safetensors")
    assert {key: tuple(rows.shape) for key, rows in vectors.items()} == {"clip_l": (2, 32), "clip_g": (2, 24)}
    code = (tmp_path / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    *loading, drawing = code.strip().splitlines()
    pipe = fresh(tiny_sdxl)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(loading), {"pipe": pipe})
    assert drawing == 'picture = pipe("a photo of <tok>").images[0]'
    ours, theirs = family.encode([PROMPT]), encoded(pipe, PROMPT.replace("TOK", "<tok>"))
    torch.testing.assert_close(ours.hidden, theirs.hidden)
    torch.testing.assert_close(ours.pooled, theirs.pooled)
    assert not torch.allclose(ours.hidden, encoded(fresh(tiny_sdxl), PROMPT).hidden)


def test_the_pooled_vector_is_read_at_the_end_whatever_an_old_config_says(tiny_sdxl: Path, tmp_path: Path) -> None:
    """The published text_encoder_2 says eos_token_id 2, by which transformers reads at the largest id of a prompt."""
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    config = base / "text_encoder_2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 2}))
    old, new = (SDXL.load(ModelArgs.model_validate({"base": str(path)}), CPU) for path in (base, tiny_sdxl))
    plain = encoded(fresh(base), PROMPT)
    torch.testing.assert_close(old.encode([PROMPT]).pooled, plain.pooled, rtol=0, atol=0)
    for family in (old, new):
        inverted(family)
    expected = new.encode([PROMPT]).pooled
    assert torch.equal(old.encode([PROMPT]).pooled, expected)  # pyright: ignore
    assert torch.equal(encoded(old.pipeline(), old.expand(PROMPT)).pooled, expected)  # pyright: ignore
    old.text_encoders["text_encoder_2"].text_model.eos_token_id = 2  # pyright: ignore
    assert not torch.allclose(old.encode([PROMPT]).pooled, expected)  # pyright: ignore


# --- which family


def test_auto_tells_folders(tiny_base: Path, tiny_sd2: Path, tiny_sdxl: Path) -> None:
    def found(base: Path) -> str:
        return sniff.named(ModelArgs.model_validate({"base": str(base)})).family

    assert [found(base) for base in (tiny_base, tiny_sd2, tiny_sdxl)] == ["sd15", "sd2", "sdxl"]
    assert found(ROOT / "testbed/base") == "sd15"


def run(*argv: str, cwd: Path) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_sdxl_from_the_command_line(tiny_sdxl: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    """Trained with its family told by the base, and drawn by predict.py from the run directory."""
    quick = ("--runtime.batch_size", "2", "--runtime.device", "cpu", "--sample.steps", "2", "--text.tokens", "1")
    where = (str(tiny_pictures), "--model.base", str(tiny_sdxl), "--runtime.out", str(tmp_path / "runs"))
    run(str(ROOT / "train.py"), "object", *where, "--runtime.steps", "3", *quick, cwd=tmp_path)
    done = RunDir(tmp_path / "runs" / "run")
    assert json.loads(done.args.read_text())["model"]["family"] == "sdxl"
    assert json.loads(done.env.read_text())["base"].keys() == {"denoiser", "vae", "text_encoder", "text_encoder_2"}
    assert len(list(read_jsonl(done.metrics))) == 3
    drawn = ("--weights", str(done.root), "--prompt", "a TOK", "--steps", "2", "--device", "cpu", "--seed", "5")
    run(str(ROOT / "predict.py"), *drawn, "--out", str(tmp_path / "drawn"), cwd=tmp_path)
    assert [path.name for path in (tmp_path / "drawn").glob("*.png")] == ["0000_seed5.png"]
