"""The commands of python -m trainer.tools, by the numbers in what they write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer import layouts, registry
from trainer.args import ModelArgs
from trainer.layouts.container import write_all
from trainer.models import FAMILIES, skeleton
from trainer.models.sd15 import SD15
from trainer.tools import lowrank
from trainer.tools.__main__ import main
from trainer.tools.lowrank import Size
from trainer.updates import Difference, LohaTensors, LoraTensors, Update, difference

CPU = torch.device("cpu")
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.1.resnets.0.conv1"
TEXT = "encoder.layers.1.self_attn.out_proj"
LAYERS = {("denoiser", ATTENTION): (32, 32), ("denoiser", CONV): (32, 16, 3, 3), ("text_encoder", TEXT): (32, 32)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loras(rank: int = 4, alpha: float = 2.0, seed: int = 0, size: float = 0.3) -> dict[tuple[str, str], Update]:
    return {
        key: LoraTensors(
            drawn(rank, *shape[1:], seed=seed + n) * size,
            drawn(shape[0], rank, *[1] * (len(shape) - 2), seed=seed + n + 50) * size,
            alpha,
        )
        for n, (key, shape) in enumerate(LAYERS.items())
    }


def write(
    path: Path, updates: Mapping[tuple[str, str], Update], dtype: torch.dtype = torch.float32, **said: str
) -> Path:
    state = layouts.kohya_state(updates, SD15.clients)
    write_all(path, {key: t if t.ndim == 0 else t.to(dtype) for key, t in state.items()}, said)
    return path


@pytest.fixture(scope="module")
def sd15(tiny_base: Path) -> SD15:
    return SD15.load(ModelArgs(base=str(tiny_base)), CPU)


@pytest.fixture
def run(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on the tiny base; what it said on stdout."""

    def do(*argv: object, status: int = 0, base: bool = True) -> str:
        words = [str(word) for word in argv]
        assert main([*words, "--base", str(tiny_base)] if base else words) == status
        told = capsys.readouterr()
        if status == 2:
            assert told.err.count("\n") == 1
            return told.err
        return told.out

    return do


def weights(base: Path) -> dict[str, Tensor]:
    files = {name: base / name for name in ("unet/diffusion_pytorch_model", "text_encoder/model")}
    return {
        f"{name.split('/')[0]}.{key.removeprefix('text_model.')}": tensor
        for name, path in files.items()
        for key, tensor in load_file(f"{path}.safetensors").items()
    }


def key_of(component: str, path: str) -> str:
    return f"{'unet' if component == 'denoiser' else component}.{path}.weight"


# --- convert


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kohya_to_another_layout_and_back_is_the_same_bits(run: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    first = write(tmp_path / "a.safetensors", loras(alpha=1.7), dtype, ss_output_name="mine")
    for layout, name in (("diffusers", "b.safetensors"), ("comfy", "c.safetensors"), ("peft", "d")):
        run("convert", first, "--to", layout, "--out", tmp_path / name)
        run("convert", tmp_path / name, "--to", "kohya", "--out", tmp_path / f"{layout}.safetensors")
        again, before = load_file(tmp_path / f"{layout}.safetensors"), load_file(first)
        assert again.keys() == before.keys()
        for key, tensor in before.items():
            assert again[key].dtype == tensor.dtype
            assert torch.equal(again[key], tensor), (layout, key)
    with safe_open(tmp_path / "comfy.safetensors", framework="pt") as file:
        said = file.metadata()
    assert (said["ss_output_name"], said["ss_base_model_version"]) == ("mine", "sd_v1")
    assert "unet.down_blocks.1.resnets.0.conv1.lora_A.weight" in load_file(tmp_path / "b.safetensors")


def test_a_converted_file_loads_in_diffusers(run: Any, tiny_base: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", loras())
    run("convert", tmp_path / "a.safetensors", "--to", "diffusers", "--out", tmp_path / "b.safetensors")
    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    layer = pipe.unet.get_submodule(CONV)
    torch.testing.assert_close(
        layer.get_delta_weight("default_0"),
        difference(loras()["denoiser", CONV], torch.zeros(32, 16, 3, 3)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_full_size_names_need_no_base(tmp_path: Path) -> None:
    """SDXL as published: from the original code's names to those of diffusers, and back."""
    name = "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_k"
    tower = "lora_te2_text_model_encoder_layers_31_mlp_fc1"
    state = {
        f"{name}.lora_down.weight": drawn(2, 2048),
        f"{name}.lora_up.weight": drawn(640, 2),
        f"{name}.alpha": torch.tensor(1.0),
        f"{tower}.lora_down.weight": drawn(2, 1280),
        f"{tower}.lora_up.weight": drawn(5120, 2),
        f"{tower}.alpha": torch.tensor(1.0),
    }
    save_file(state, tmp_path / "a.safetensors")
    for layout, source in (("diffusers", "a"), ("kohya", "diffusers")):
        out = tmp_path / f"{layout}.safetensors"
        assert main(["convert", str(tmp_path / f"{source}.safetensors"), "--to", layout, "--out", str(out)]) == 0
    assert "unet.up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_k.lora_A.weight" in load_file(
        tmp_path / "diffusers.safetensors"
    )
    again = load_file(tmp_path / "kohya.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_an_embedding_becomes_what_the_uis_read(run: Any, tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": drawn(3, 32)}, "name": "me"}, tmp_path / "me.pt")
    run("convert", tmp_path / "me.pt", "--out", tmp_path / "me.safetensors")
    assert torch.equal(load_file(tmp_path / "me.safetensors")["emb_params"], drawn(3, 32))
    save_file({"text_encoders_0": drawn(1, 768), "text_encoders_1": drawn(1, 1280)}, tmp_path / "embeddings.pti")
    run("convert", tmp_path / "embeddings.pti", "--out", tmp_path / "two.safetensors", base=False)
    assert {k: tuple(t.shape) for k, t in load_file(tmp_path / "two.safetensors").items()} == {
        "clip_l": (1, 768),
        "clip_g": (1, 1280),
    }


# --- inspect, strip, compare


def test_inspect_tells_kinds_ranks_norms_and_readers(run: Any, tmp_path: Path) -> None:
    updates = loras()
    updates["denoiser", "mid_block.attentions.0.proj_in"] = LohaTensors(
        drawn(32, 3), drawn(3, 32), drawn(32, 3), drawn(3, 32), 6.0
    )
    path = write(tmp_path / "a.safetensors", updates, ss_tag="x" * 200)
    facts = json.loads(run("inspect", path, "--json", base=False))
    assert facts["what"] == "updates of layers"
    assert facts["spelled"] == {"kohya": 14}
    assert facts["not understood"] == []
    assert {(row["kind"], row["rank"], row["alpha"], row["layers"]) for row in facts["kinds"]} == {
        ("lora", 4, 2.0, 3),
        ("loha", 3, 6.0, 1),
    }
    norms = {layer["name"]: layer["norm"] for layer in facts["layers"]}
    for key, update in updates.items():
        shape = LAYERS.get(key, (32, 32))
        expected = float(difference(update, torch.zeros(shape)).norm())
        assert norms[SD15.clients.kohya(*key)] == pytest.approx(expected, rel=1e-5)
    assert facts["norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5)
    assert facts["programs"]["ComfyUI"] == "yes"
    assert facts["programs"]["diffusers"] == "no: it reads no loha"
    text = run("inspect", path, "--layers", base=False)
    assert "3 lora of rank 4, alpha 2" in text
    assert len(text.splitlines()) < 40


def test_inspect_of_what_is_no_update(run: Any, tiny_base: Path, tmp_path: Path) -> None:
    save_file({"emb_params": drawn(2, 32)}, tmp_path / "e.safetensors")
    assert json.loads(run("inspect", tmp_path / "e.safetensors", "--json", base=False))["vectors"] == {
        "emb_params": [2, 32]
    }
    unet = tiny_base / "unet" / "diffusion_pytorch_model.safetensors"
    assert "a part of a diffusers folder" in run("inspect", unet, base=False)
    (tmp_path / "x.safetensors").write_bytes(b"PK\3\4")
    assert "is a zip" in run("inspect", tmp_path / "x.safetensors", base=False, status=2)


def test_strip_leaves_the_tensors_and_what_they_mean(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", loras(), torch.bfloat16, ss_output_name="secret", title="t", format="pt")
    said = run("strip", path, "--out", tmp_path / "b.safetensors", "--keep", "title", base=False)
    assert "ss_output_name" in said
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert file.metadata() == {"title": "t"}
    before, after = load_file(path), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    alpha = {"lora_adapter_metadata": "{}", "ss_x": "1"}
    save_file(layouts.diffusers_state(loras(), SD15.clients), tmp_path / "c.safetensors", alpha)
    run("strip", tmp_path / "c.safetensors", "--out", tmp_path / "d.safetensors", base=False)
    with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        assert file.metadata() == {"lora_adapter_metadata": "{}"}


def test_compare_tells_by_its_status(run: Any, tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", loras())
    near = loras()
    off: Any = near["denoiser", ATTENTION]
    near["denoiser", ATTENTION] = LoraTensors(off.down + 0.01, off.up, off.alpha)
    b = write(tmp_path / "b.safetensors", near)
    assert "12 compared" not in run("compare", a, a, base=False)
    assert "9 compared, 9 equal; they are the same" in run("compare", a, a, base=False)
    rows = json.loads(run("compare", a, b, "--json", base=False, status=1))["rows"]
    assert rows[0]["largest"] == pytest.approx(0.01, rel=1e-4)
    assert rows[0]["mean"] == pytest.approx(0.01, rel=1e-4)
    flat, moved = off.down.flatten(), off.down.flatten() + 0.01
    assert rows[0]["cosine"] == pytest.approx(float(flat @ moved / flat.norm() / moved.norm()), rel=1e-5)
    assert rows[1]["largest"] == 0
    run("compare", a, b, "--tolerance", "0.011", base=False)
    run("convert", a, "--to", "diffusers", "--out", tmp_path / "c.safetensors")
    assert "only in" in run("compare", a, tmp_path / "c.safetensors", base=False, status=1)
    assert "3 compared, 3 equal" in run("compare", a, tmp_path / "c.safetensors", "--updates")
    run("compare", b, tmp_path / "c.safetensors", "--updates", status=1)
    save_file({"x": torch.tensor([float("nan")])}, tmp_path / "n.safetensors")
    save_file({"x": torch.tensor([1.0])}, tmp_path / "m.safetensors")
    run("compare", tmp_path / "n.safetensors", tmp_path / "m.safetensors", base=False, status=1)


# --- merge


def test_joined_files_are_their_sum_exactly(run: Any, tmp_path: Path) -> None:
    one, two = loras(rank=4), loras(rank=3, alpha=5.0, seed=20)
    a, b = write(tmp_path / "a.safetensors", one), write(tmp_path / "b.safetensors", two)
    out = tmp_path / "c.safetensors"
    said = run("merge", f"{a}=0.8", f"{b}=0.5,mid_block=-2,text_encoder=0", "--out", out)
    assert "3 layers, exactly" in said
    found = load_file(out)
    for key, shape in LAYERS.items():
        name = SD15.clients.kohya(*key)
        down, up, alpha = (found[f"{name}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        strength = {ATTENTION: -2.0, CONV: 0.5, TEXT: 0.0}[key[1]]
        assert len(down) == (4 if strength == 0 else 7) == alpha
        expected = 0.8 * difference(one[key], torch.zeros(shape)) + strength * difference(two[key], torch.zeros(shape))
        got = (up.flatten(1) @ down.flatten(1)).reshape(shape)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_one_merged_file_is_both_adapters_together(run: Any, tiny_base: Path, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.safetensors", loras()), write(tmp_path / "b.safetensors", loras(seed=20))
    run("merge", f"{a}=0.7", f"{b}=0.4", "--out", tmp_path / "c.safetensors")
    run("merge", f"{a}=0.7", f"{b}=0.4", "--into", tiny_base, "--out", tmp_path / "merged", base=False)
    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_base)
    plain = picture(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors", adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.7, 0.4])
    together = picture(pipe)
    alone: Any = StableDiffusionPipeline.from_pretrained(tiny_base)
    alone.load_lora_weights(tmp_path, weight_name="c.safetensors")
    merged: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert (plain - together).abs().max() > 0.02
    for found in (picture(alone), picture(merged)):
        torch.testing.assert_close(found, together, rtol=0, atol=1e-4)


def picture(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    made = pipe("a red star", num_inference_steps=3, generator=generator, output_type="np", height=32, width=32)
    return torch.tensor(made.images)


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_checkpoint_gets_the_updates_and_nothing_else(
    tiny_base: Path, tiny_sdxl: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """In both forms of a base, towers of OpenCLIP among them, where queries are rows of a fused tensor."""
    folder = tiny_base if name == "sd15" else tiny_sdxl
    family: Any = registry.load(FAMILIES, name, "model.family").load(ModelArgs(base=str(folder)), CPU)
    places = {"denoiser": ATTENTION, "text_encoder": TEXT}
    if name == "sdxl":
        places["text_encoder_2"] = "text_model.encoder.layers.1.self_attn.v_proj"
    roots = {"denoiser": family.denoiser, **family.text_encoders}
    updates: dict[tuple[str, str], Update] = {}
    for part, path in places.items():
        layer: Any = roots[part].get_submodule(path)
        o, i = layer.weight.shape
        updates[part, path] = LoraTensors(drawn(2, i), drawn(o, 2), 2.0)
    if name == "sdxl":  # [20, 24], transposed in a single file
        updates["text_encoder_2", "text_projection"] = LoraTensors(drawn(2, 24), drawn(20, 2), 2.0)
    updates["denoiser", "conv_norm_out"] = Difference(drawn(16), drawn(16, seed=3))
    write_all(tmp_path / "a.safetensors", layouts.kohya_state(updates, family.clients), {})
    base, out, config = folder, tmp_path / "out", []
    if kind == "file":
        base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
        write_all(base, {k: t.contiguous() for k, t in family.single_file(family.tensors()).items()}, {"title": "kept"})
        config = ["--config", str(folder)]
    given = f"{tmp_path / 'a.safetensors'}=0.5"
    assert main(["merge", given, "--into", str(base), "--out", str(out), *config]) == 0
    kept = ModelArgs.model_validate({"base": str(out), "config": str(folder) if kind == "file" else None})
    merged: Any = registry.load(FAMILIES, name, "model.family").load(kept, CPU)
    live = {"denoiser": merged.denoiser, **merged.text_encoders}
    for part, root in roots.items():
        for (path, before), after in zip(root.named_parameters(), live[part].parameters(), strict=True):
            module, _, end = path.rpartition(".")
            update = updates.get((part, module))
            expected = before
            if update is not None and end == "weight":
                expected = before + 0.5 * difference(update, before)
            elif isinstance(update, Difference) and end == "bias":
                expected = before + 0.5 * update.bias
            torch.testing.assert_close(after, expected, rtol=0, atol=1e-6 if update is not None else 0, msg=path)
    if kind == "file":
        with safe_open(out, framework="pt") as file:
            assert file.metadata()["title"] == "kept"
    else:
        assert (out / "model_index.json").read_text() == (folder / "model_index.json").read_text()


def test_sums_that_no_file_holds_are_cut_or_refused(run: Any, tiny_base: Path, tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", loras())
    key = ("denoiser", ATTENTION)
    lora: Any = loras()[key]
    dora = LoraTensors(lora.down, lora.up, lora.alpha, drawn(1, 32).abs() + 1)
    d = write(tmp_path / "d.safetensors", {key: dora})
    h = write(tmp_path / "h.safetensors", {key: LohaTensors(drawn(32, 1), drawn(1, 32), drawn(32, 1), drawn(1, 32), 1)})
    out = tmp_path / "o.safetensors"
    said = run("merge", a, h, "--out", out, status=2)
    assert "has loha, lora, whose sum no file holds exactly; give --rank or --energy" in said
    assert not out.exists()
    run("merge", a, h, "--rank", 5, "--out", out)
    loha = difference(LohaTensors(drawn(32, 1), drawn(1, 32), drawn(32, 1), drawn(1, 32), 1), torch.zeros(32, 32))
    total = difference(lora, torch.zeros(32, 32)) + loha  # of rank 5
    torch.testing.assert_close(product(out, key), total, rtol=0, atol=1e-5)
    said = run("merge", d, "--rank", 32, "--out", tmp_path / "x.safetensors", "--base", "sd15", base=False, status=2)
    run("merge", d, "--rank", 32, "--out", tmp_path / "x.safetensors")
    weight = weights(tiny_base)[key_of(*key)]
    torch.testing.assert_close(product(tmp_path / "x.safetensors", key), difference(dora, weight), rtol=0, atol=1e-5)
    for words, said in (
        ((f"{a}=0",), "every strength is 0"),
        ((f"{a}=1,nowhere=2",), "changes no layer with 'nowhere'"),
        ((f"{a}=1,(=2",), "is not FILE, FILE=STRENGTH"),
        ((a, "--rank", 0), "--rank is 0"),
        ((a, "--energy", 1.5), "--energy is 1.5"),
        ((a, "--config", tiny_base), "--config gives the configs of a base that is one file"),
        ((a, "--into", tiny_base, "--rank", 3), "leave --rank out"),
        ((tmp_path / "none.safetensors",), "does not exist"),
    ):
        assert said in run("merge", *words, "--out", tmp_path / "y.safetensors", status=2, base="--into" not in words)
    assert "exists already" in run("merge", a, "--out", out, status=2)


def product(path: Path, key: tuple[str, str]) -> Tensor:
    found, name = load_file(path), SD15.clients.kohya(*key)
    down, up = found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"]
    scale = found[f"{name}.alpha"] / len(down)
    return scale * (up.flatten(1) @ down.flatten(1))


# --- extract, resize


def test_extract_recovers_what_was_added(run: Any, tiny_base: Path, tmp_path: Path) -> None:
    updates = loras(rank=3)
    a = write(tmp_path / "a.safetensors", updates)
    run("merge", a, "--into", tiny_base, "--out", tmp_path / "tuned", base=False)
    for size in (("--rank", 3), ("--energy", 0.999999)):
        out = tmp_path / f"{size[0][2:]}.safetensors"
        said = run("extract", tiny_base, tmp_path / "tuned", *size, "--out", out, base=False)
        assert "3 layers of rank 3" in said
        for key, shape in LAYERS.items():
            expected = difference(updates[key], torch.zeros(shape)).flatten(1)
            off = (product(out, key) - expected).norm() / expected.norm()
            assert off < 1e-5, key  # float32 weights: the sum is rounded to 2**-24 of the weight
    sizes = ("--rank", 3, "--conv-rank", 1)
    said = run("extract", tiny_base, tmp_path / "tuned", *sizes, "--out", tmp_path / "c.safetensors", base=False)
    assert "rank 1 to 3" in said
    best = torch.linalg.svdvals(difference(updates["denoiser", CONV], torch.zeros(32, 16, 3, 3)).flatten(1))
    expected = difference(updates["denoiser", CONV], torch.zeros(32, 16, 3, 3)).flatten(1)
    missing = (product(tmp_path / "c.safetensors", ("denoiser", CONV)) - expected).norm()
    torch.testing.assert_close(missing, best[1:].norm(), rtol=1e-4, atol=1e-5)
    assert "nothing to extract" in run(
        "extract", tiny_base, tiny_base, "--rank", 2, "--out", tmp_path / "z.safetensors", base=False, status=2
    )
    assert "--rank or --energy is missing" in run(
        "extract", tiny_base, tiny_base, "--out", tmp_path / "z.safetensors", base=False, status=2
    )


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_resize_keeps_the_energy_that_was_asked_for(run: Any, tmp_path: Path, energy: float) -> None:
    updates = loras(rank=12)
    a = write(tmp_path / "a.safetensors", updates)
    run("resize", a, "--energy", energy, "--out", tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    for key, shape in LAYERS.items():
        whole = difference(updates[key], torch.zeros(shape)).flatten(1)
        values = torch.linalg.svdvals(whole.double()).square()
        rank = len(found[f"{SD15.clients.kohya(*key)}.lora_down.weight"])
        share = float(values[:rank].sum() / values.sum())
        assert share >= energy - 1e-6
        assert rank == 12 if energy == 1 else float(values[: rank - 1].sum() / values.sum()) < energy
        got = product(tmp_path / "b.safetensors", key).norm() ** 2 / whole.norm() ** 2
        assert float(got) == pytest.approx(share, abs=1e-5)


def test_resize_to_a_rank_is_the_best_of_that_rank(run: Any, tmp_path: Path) -> None:
    key = ("denoiser", ATTENTION)
    lora: Any = loras(rank=40)[key]  # more than the layer has: not by its factors
    lengths = drawn(1, 32).abs() + 1
    a = write(tmp_path / "a.safetensors", {key: LoraTensors(lora.down, lora.up, lora.alpha, lengths)})
    said = run("resize", a, "--rank", 5, "--out", tmp_path / "b.safetensors")
    assert "rank 40 -> 5" in said
    u, s, vh = torch.linalg.svd(difference(lora, torch.zeros(32, 32)))
    torch.testing.assert_close(product(tmp_path / "b.safetensors", key), u[:, :5] * s[:5] @ vh[:5], rtol=0, atol=1e-4)
    assert torch.equal(load_file(tmp_path / "b.safetensors")[f"{SD15.clients.kohya(*key)}.dora_scale"], lengths)
    norms = {("denoiser", "conv_norm_out"): Difference(drawn(16))}
    n = write(tmp_path / "n.safetensors", norms)
    assert "has no matrices to resize: full" in run(
        "resize", n, "--rank", 2, "--out", tmp_path / "x.safetensors", status=2
    )


def test_a_cut_by_factors_is_the_cut_of_the_product() -> None:
    update = LoraTensors(drawn(6, 16, 3, 3), drawn(32, 6, 1, 1, seed=1), 3.0)
    whole = difference(update, torch.zeros(32, 16, 3, 3))
    for size in (Size(rank=2), Size(energy=0.8), Size(rank=3, energy=0.99), Size(rank=99)):
        one, two = lowrank.cut(update, size), lowrank.nearest(whole, size)
        assert one.lora.down.shape[0] == min(two.lora.down.shape[0], 6)
        assert one.energy == pytest.approx(two.energy, abs=1e-6)
        torch.testing.assert_close(difference(one.lora, whole), difference(two.lora, whole), rtol=0, atol=1e-4)
    nothing = lowrank.nearest(torch.zeros(4, 4), Size(energy=0.9))
    assert (nothing.energy, nothing.lora.down.shape[0]) == (1.0, 1)


def test_a_hidden_number_that_a_dtype_cannot_hold_is_refused(run: Any, tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", loras(size=300.0))
    said = run("convert", a, "--to", "kohya", "--dtype", "fp16", "--out", tmp_path / "b.safetensors")
    big = loras(size=3e5)
    c = write(tmp_path / "c.safetensors", big)
    said = run("convert", c, "--to", "kohya", "--dtype", "fp16", "--out", tmp_path / "d.safetensors", status=2)
    assert "take --dtype fp32 or bf16" in said
    assert not (tmp_path / "d.safetensors").exists()


def test_published_skeletons_are_full_size() -> None:
    for name, layers, widths in (("sd15", 282, {768}), ("sd2", 282, {1024}), ("sdxl", 794, {2048})):
        bones = skeleton.published(name)
        found = [m for m in bones.denoiser.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        assert len(found) == layers
        read = {m.in_features for p, m in bones.denoiser.named_modules() if p.endswith("attn2.to_k")}  # type: ignore[union-attr]
        assert read == widths
