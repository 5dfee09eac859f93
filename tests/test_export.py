"""Every exported file, loaded by diffusers into a fresh base, must compute what the trainer's live modules do."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer import export as exporting
from trainer import layouts
from trainer.adapters.lora import LoRA
from trainer.adapters.textual_inversion import TextualInversion
from trainer.args import TrainArgs
from trainer.export.files import embedding_state
from trainer.export.names import diffusers_token
from trainer.models.sd15 import SD15
from trainer.types import Cond
from trainer.updates import LoraTensors

CPU = torch.device("cpu")
PROMPT = "a photo of TOK on a red background"


def arguments(base: Path, adapter: Mapping[str, object] | None = None, **model: str) -> TrainArgs:
    return TrainArgs.model_validate(
        {
            "data": {"source": "pictures", "trigger": "TOK"},
            "model": {"base": str(base), **model},
            "adapter": adapter or {"rank": 4, "alpha": 2.0},
            "text": {"tokens": 2},
            "export": {"layouts": ["kohya", "diffusers", "embedding"]},
        }
    )


def trained(family: SD15, args: TrainArgs) -> LoRA:
    """A LoRA with an update that is large against the weights, so that a lost alpha shows."""
    lora = LoRA(args.adapter, seed=0)
    lora.attach(family)
    generator = torch.Generator().manual_seed(5)
    for tensor in lora.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return lora


def unet_output(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    xt, hidden = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 32, 32, generator=generator)
    with torch.no_grad():
        return unet(xt, torch.tensor([10, 900]), hidden, return_dict=False)[0]


def fresh(base: Path, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("file", ["run.safetensors", "pytorch_lora_weights.safetensors"])
@pytest.mark.parametrize(
    ("deep", "targets", "rank", "alpha"),
    [
        (False, "attention", 4, 2.0),
        (False, "attention+ff+conv", 3, 7.5),
        (True, "attention+ff", 4, None),
        (True, "attention+ff+conv", 4, 2.0),
    ],
)
def test_lora_files_are_the_live_update(
    request: pytest.FixtureRequest, tmp_path: Path, file: str, deep: bool, targets: str, rank: int, alpha: float | None
) -> None:
    base: Path = request.getfixturevalue("tiny_base_deep" if deep else "tiny_base")
    args = arguments(base, {"rank": rank, "alpha": alpha, "targets": targets})
    family = SD15.load(args.model, CPU)
    plain = unet_output(family.denoiser)
    exporting.export(tmp_path, "run", family, [trained(family, args)], args)
    live = unet_output(family.denoiser)
    pipe = fresh(base)
    pipe.load_lora_weights(tmp_path, weight_name=file)
    loaded = unet_output(pipe.unet)
    assert (live - plain).abs().max() > 0.1
    torch.testing.assert_close(loaded, live, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("file", ["run.safetensors", "pytorch_lora_weights.safetensors"])
def test_pivotal_files_give_the_live_pictures(tiny_base: Path, tmp_path: Path, file: str) -> None:
    args = arguments(tiny_base)
    family = SD15.load(args.model, CPU)
    lora, inversion = trained(family, args), TextualInversion(args.text, "TOK", seed=3)
    inversion.attach(family)
    exporting.export(tmp_path, "run", family, [lora, inversion], args)
    pipe = fresh(tiny_base)
    pipe.load_lora_weights(tmp_path, weight_name=file)
    pipe.load_textual_inversion(tmp_path / "run_embedding.safetensors", token="<tok>")
    prompt = PROMPT.replace("TOK", "<tok>")
    expected, _ = pipe.encode_prompt(prompt, CPU, 1, False)
    torch.testing.assert_close(family.encode([PROMPT]).hidden, expected)

    def sample(pipeline: StableDiffusionPipeline, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.tensor(pipeline(prompt, num_inference_steps=4, generator=generator, output_type="np").images)

    live = sample(family.pipeline(), family.expand(PROMPT))
    torch.testing.assert_close(sample(pipe, prompt), live, rtol=0, atol=1e-3)
    assert (sample(fresh(tiny_base), PROMPT) - live).abs().max() > 0.02


def test_kohya_layout_is_what_the_clients_read(tiny_base: Path, tmp_path: Path) -> None:
    args = arguments(tiny_base, {"rank": 4, "alpha": 2.0, "targets": "attention+ff+conv"})
    family = SD15.load(args.model, CPU)
    lora = trained(family, args)
    exporting.export(tmp_path, "run", family, [lora], args)
    state = load_file(tmp_path / "run.safetensors")
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert state[f"{key}.lora_down.weight"].shape == (4, 32)
    assert state[f"{key}.lora_up.weight"].shape == (32, 4)
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert state[f"{conv}.lora_down.weight"].shape == (4, 16, 3, 3)
    assert state[f"{conv}.lora_up.weight"].shape == (16, 4, 1, 1)
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha" in state
    alphas = [tensor for name, tensor in state.items() if name.endswith(".alpha")]
    assert len(alphas) == len(lora.modules()) == len(state) / 3
    assert {(t.ndim, t.dtype, float(t)) for t in alphas} == {(0, torch.float32, 2.0)}


def test_names_are_those_of_full_size_stable_diffusion() -> None:
    names = SD15.clients
    attention = "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0"
    assert names.kohya("denoiser", attention) == (
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn1_to_out_0"
    )
    assert names.diffusers("denoiser", attention) == f"unet.{attention}"
    for path in ("encoder.layers.11.self_attn.q_proj", "text_model.encoder.layers.11.self_attn.q_proj"):
        assert names.kohya("text_encoder", path) == "lora_te_text_model_encoder_layers_11_self_attn_q_proj"
        assert names.diffusers("text_encoder", path) == "text_encoder.text_model.encoder.layers.11.self_attn.q_proj"


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_text_encoder_names_load(tiny_base: Path, tmp_path: Path, layout: str) -> None:
    tower = fresh(tiny_base).text_encoder
    targets = [p for p, m in tower.named_modules() if isinstance(m, torch.nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=2, target_modules=targets), tower)
    generator = torch.Generator().manual_seed(0)
    modules: dict[tuple[str, str], LoraTensors] = {}
    for path, layer in tower.named_modules():
        if hasattr(layer, "lora_A"):
            down, up = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
            for tensor in (down, up):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            modules["text_encoder", path] = LoraTensors(down, up, 2.0)
    file = tmp_path / "te.safetensors"
    if layout == "kohya":
        save_file(layouts.kohya_state(modules, SD15.clients), file)
    else:
        facts = {"format": "pt", "lora_adapter_metadata": layouts.diffusers_metadata(modules, SD15.clients)}
        save_file(layouts.diffusers_state(modules, SD15.clients), file, metadata=facts)
    pipe = fresh(tiny_base)
    pipe.load_lora_weights(tmp_path, weight_name="te.safetensors")
    ids = torch.tensor([[572, 1, 2, 3, 573]])
    with torch.no_grad():
        live, loaded, plain = (model(ids)[0] for model in (tower, pipe.text_encoder, fresh(tiny_base).text_encoder))
    assert (live - plain).abs().max() > 0.05
    torch.testing.assert_close(loaded, live, rtol=1e-5, atol=2e-5)


def test_metadata_is_right_and_tells_nothing_private(tiny_base: Path, tmp_path: Path) -> None:
    args = arguments(tiny_base)
    args = args.model_copy(update={"data": args.data.model_copy(update={"resolution": (512, 768)})})
    family = SD15.load(args.model, CPU)
    inversion = TextualInversion(args.text, "TOK", seed=3)
    inversion.attach(family)
    exporting.export(tmp_path, "my.run", family, [trained(family, args), inversion], args)
    shown = metadata(tmp_path / "my.run.safetensors")
    assert shown["ss_base_model_version"] == "sd_v1"
    assert shown["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (shown["ss_network_dim"], shown["ss_network_alpha"]) == ("4", "2")
    assert (shown["ss_resolution"], shown["modelspec.resolution"]) == ("(768, 768)", "768x768")
    assert shown["ss_output_name"] == shown["modelspec.title"] == "my.run"
    assert shown["modelspec.prediction_type"] == "v"
    assert shown["modelspec.trigger_phrase"] == "TOK"
    assert shown["ss_sd_model_name"] == "tiny"
    peft = json.loads(metadata(tmp_path / "pytorch_lora_weights.safetensors")["lora_adapter_metadata"])
    assert (peft["unet.r"], peft["unet.lora_alpha"]) == (4, 2.0)
    embedding = tmp_path / "my_run_embedding.safetensors"  # clients stop a prompt's word at a dot
    assert {key: tuple(t.shape) for key, t in load_file(embedding).items()} == {"emb_params": (2, 32)}
    for file in tmp_path.iterdir():
        assert str(tiny_base.parent).encode() not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_note_names_the_files_and_its_code_works(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tiny_base)
    family = SD15.load(args.model, CPU)
    lora, inversion = trained(family, args), TextualInversion(args.text, "TOK", seed=3)
    inversion.attach(family)
    files = exporting.export(tmp_path, "run", family, [lora, inversion], args)
    assert sorted(files) == sorted(tmp_path.iterdir())
    note = (tmp_path / "README.md").read_text()
    for text in ("<lora:run:1>", "embedding:run_embedding", "rank 4, alpha 2", "2 token vectors", "tiny", "`TOK`"):
        assert text in note
    code = note.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"pipe": fresh(tiny_base)}
    *loads, draw = code.strip().splitlines()
    exec("\n".join(loads), scope)
    torch.manual_seed(3)
    exec(draw, scope)
    torch.manual_seed(3)
    live = family.pipeline()(family.expand("a photo of TOK")).images[0]
    difference = np.asarray(scope["picture"], dtype=np.int16) - np.asarray(live, dtype=np.int16)
    assert abs(difference).max() <= 1


@pytest.mark.parametrize(("trigger", "token"), [("TOK", "<tok>"), ("<Rose>", "<rose>"), ("sks", "<sks>")])
def test_the_token_for_diffusers(trigger: str, token: str) -> None:
    assert diffusers_token(trigger) == token


def test_lora_alone_writes_no_embedding(tiny_base: Path, tmp_path: Path) -> None:
    args = arguments(tiny_base)
    family = SD15.load(args.model, CPU)
    exporting.export(tmp_path, "run", family, [trained(family, args)], args)
    names = {"run.safetensors", "pytorch_lora_weights.safetensors", "run_comfyui.json", "README.md"}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_files_have_the_bases_dtype(tiny_base: Path, tmp_path: Path) -> None:
    args = arguments(tiny_base, dtype="bf16")
    family = SD15.load(args.model, CPU)
    exporting.export(tmp_path, "run", family, [trained(family, args)], args)
    state = load_file(tmp_path / "run.safetensors")
    assert {t.dtype for key, t in state.items() if "lora_" in key.split(".", 1)[1]} == {torch.bfloat16}
    assert {t.dtype for key, t in state.items() if key.endswith(".alpha")} == {torch.float32}
    pipe = fresh(tiny_base, torch.bfloat16)
    pipe.load_lora_weights(tmp_path, weight_name="run.safetensors")
    cond = Cond(torch.zeros(1, 32, 32))
    live = family.predict(torch.ones(1, 4, 16, 16), torch.tensor([5]), cond)
    half = torch.bfloat16
    with torch.no_grad():
        loaded = pipe.unet(torch.ones(1, 4, 16, 16, dtype=half), torch.tensor([5]), cond.hidden.to(half)).sample
    torch.testing.assert_close(loaded.float(), live, rtol=0.1, atol=0.1)


def test_what_is_not_finite_is_refused_and_nothing_is_written(tiny_base: Path, tmp_path: Path) -> None:
    args = arguments(tiny_base)
    family = SD15.load(args.model, CPU)
    lora = trained(family, args)
    next(iter(lora.state_dict().values()))[0, 0] = float("nan")
    with pytest.raises(exporting.ExportError, match="1 tensors are not finite"):
        exporting.export(tmp_path, "run", family, [lora], args)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_layout_is_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    args = arguments(tiny_base)
    family = SD15.load(args.model, CPU)

    class Other:
        def state_dict(self) -> dict[str, Tensor]:
            return {"some.tensor": torch.zeros(1)}

    with pytest.raises(exporting.ExportError, match=r"some\.tensor"):
        exporting.export(tmp_path, "run", family, [Other()], args)
    with pytest.raises(exporting.ExportError, match="text_encoder_9"):
        embedding_state({"text_encoder_9": torch.zeros(1, 4)}, SD15.clients)
    two = {("denoiser", "a"): LoraTensors(torch.zeros(2, 3), torch.zeros(3, 2), 1.0)}
    two["denoiser", "b"] = LoraTensors(torch.zeros(4, 3), torch.zeros(3, 4), 1.0)
    facts = json.loads(layouts.diffusers_metadata(two, SD15.clients))
    assert {facts["unet.r"], *facts["unet.rank_pattern"].values()} == {2, 4}
    clash = {("denoiser", p): LoraTensors(torch.zeros(2, 3), torch.zeros(3, 2), 1.0) for p in ("a.b", "a_b")}
    with pytest.raises(layouts.LayoutError, match="share one kohya name"):
        layouts.kohya_state(clash, SD15.clients)


def test_a_full_disk_leaves_the_old_files(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tiny_base)
    family = SD15.load(args.model, CPU)
    lora = trained(family, args)
    exporting.export(tmp_path, "run", family, [lora], args)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        exporting.export(tmp_path, "run", family, [lora], args)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
