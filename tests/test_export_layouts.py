"""The layouts of export.layouts: each loaded by the program that it is for, or refused with what it cannot say."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer import export as exporting
from trainer import registry
from trainer.adapters import ADAPTERS
from trainer.adapters.layered import Layers
from trainer.adapters.textual_inversion import TextualInversion
from trainer.args import AdapterArgs, ExportArgs, ModelArgs, TextArgs, TrainArgs
from trainer.export.files import Tensors, _store  # pyright: ignore[reportPrivateUsage]
from trainer.models import FAMILIES
from trainer.types import HasCheckpoint, ModelFamily
from trainer.updates import difference, nearest_lora

CPU = torch.device("cpu")
CONV = "attention+ff+conv"
TEXT = {"train": True, "rank": 2, "targets": "attention+ff"}
BASES = {"sd15": "tiny_base", "sd2": "tiny_sd2", "sdxl": "tiny_sdxl"}
BY_PEFT: dict[str, dict[str, Any]] = {
    "lora": {
        "rank": 4,
        "alpha": 2.0,
        "ranks": {"mid_block": 2},
        "alphas": {"proj_in": 3.0},
        "targets": CONV,
        "text": TEXT,
    },
    "dora-rows": {"kind": "dora", "rank": 4, "alpha": 2.0, "axis": "output", "targets": CONV, "text": TEXT},
    "loha": {"kind": "loha", "rank": 3, "alpha": 6.0, "ranks": {"mid_block": 2}, "targets": CONV, "text": TEXT},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 3.0, "targets": CONV},
    "lokr-factor": {"kind": "lokr", "rank": 1000, "alpha": 500.0, "factor": 4, "targets": CONV},
}


def family_of(name: str, base: Path, **model: Any) -> ModelFamily:
    return registry.load(FAMILIES, name, "family").load(ModelArgs(base=str(base), **model), CPU)


def arguments(base: Path, adapter: dict[str, Any], layouts: list[str], tokens: int = 0, **export: Any) -> TrainArgs:
    return TrainArgs.model_validate(
        {
            "data": {"source": "pictures"},
            "model": {"base": str(base)},
            "adapter": adapter,
            "text": {"tokens": tokens},
            "export": {"layouts": layouts, **export},
        }
    )


def trained(family: ModelFamily, adapter: dict[str, Any], size: float = 0.1) -> list[Layers]:
    args = AdapterArgs.model_validate(adapter)
    kind = registry.load(ADAPTERS, args.kind, "adapter.kind")
    parts: list[Layers] = [kind(args, 0)]
    if args.text.train:
        parts.append(kind(args.for_text(), 1, "text"))
    generator = torch.Generator().manual_seed(5)
    for part in parts:
        part.attach(family)
        for tensor in part.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * size)
    return parts


def roots(family: ModelFamily) -> dict[str, nn.Module]:
    return {"unet": family.denoiser, **family.text_encoders}


def outputs(part: str, module: Any) -> Tensor:
    """Of a text tower, or of the UNet of any of the three tiny bases."""
    if part != "unet":
        return module(torch.tensor([[572, 1, 2, 3, 573]]))[0]
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(1, 4, 16, 16, generator=generator)
    hidden = torch.randn(1, 32, module.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.ones(1, 20), "time_ids": torch.full((1, 6), 32.0)}
    return module(xt, torch.tensor([500]), hidden, added_cond_kwargs=added, return_dict=False)[0]


@pytest.mark.parametrize("kind", BY_PEFT)
def test_peft_loads_its_folders(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    family = family_of("sd15", tiny_base)
    parts = trained(family, BY_PEFT[kind])
    exporting.export(tmp_path, "run", family, parts, arguments(tiny_base, BY_PEFT[kind], ["peft"]))
    wanted = {"unet", "text_encoder"} if "text" in BY_PEFT[kind] else {"unet"}
    assert {path.name for path in (tmp_path / "run_peft").iterdir()} == wanted
    for part, fresh in roots(family_of("sd15", tiny_base)).items():
        with torch.no_grad():
            plain, live = outputs(part, fresh), outputs(part, roots(family)[part])
            if part in wanted:
                loaded = PeftModel.from_pretrained(fresh, tmp_path / "run_peft" / part)
                assert (live - plain).abs().max() > 1e-3
                torch.testing.assert_close(outputs(part, loaded), live, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", BASES)
def test_a_whole_model_is_the_live_one(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """As a single file read by our loader (diffusers' conversion), and as a folder read by diffusers."""
    base: Path = request.getfixturevalue(BASES[name])
    family = family_of(name, base)
    full = {"kind": "full", "targets": "all", "text": {"train": True, "targets": "all"}}
    rows = TextualInversion(TextArgs.model_validate({"tokens": 2}), "TOK", seed=0)
    rows.attach(family)
    parts = trained(family, full, size=0.02)
    args = arguments(base, full, ["checkpoint", "checkpoint-folder", "embedding"], tokens=2)
    files = exporting.export(tmp_path, "run", family, [rows, *parts], args)
    assert {file.name for file in files} == {
        "run_model.safetensors", "run_model", "run_embedding.safetensors", "run_comfyui.json", "README.md"
    }  # fmt: skip
    single = family_of(name, tmp_path / "run_model.safetensors", config=str(base))
    folder = family_of(name, tmp_path / "run_model")
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "run_model")
    assert single.path.target == folder.path.target == family.path.target
    with torch.no_grad():
        for part, live in roots(family).items():
            expected = outputs(part, live)
            assert (outputs(part, roots(family_of(name, base))[part]) - expected).abs().max() > 1e-3
            for other in (roots(single)[part], roots(folder)[part], getattr(stock, part)):
                torch.testing.assert_close(outputs(part, other), expected, rtol=1e-4, atol=2e-5)
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        for other in (single.vae, folder.vae, stock.vae):
            vae: Any = other
            torch.testing.assert_close(vae.decode(latent).sample, family.vae.decode(latent).sample)  # type: ignore[operator]
    prompt = ["a red star"]
    with torch.no_grad():
        torch.testing.assert_close(folder.encode(prompt).hidden, family.encode(prompt).hidden, rtol=1e-4, atol=2e-5)
    for file in tmp_path.rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) == (0o755 if file.is_dir() else 0o644), file
        if file.is_file():
            assert str(base.parent).encode() not in file.read_bytes(), file
            assert b"<concept-0>" not in file.read_bytes(), file
    assert not list(tmp_path.glob(".*"))


def test_tensors_of_a_family_are_the_bases_whatever_is_attached(tiny_sdxl: Path) -> None:
    family = family_of("sdxl", tiny_sdxl)
    assert isinstance(family, HasCheckpoint)
    before = {part: {name: t.clone() for name, t in own.items()} for part, own in family.tensors().items()}
    TextualInversion(TextArgs.model_validate({"tokens": 2}), "TOK", seed=0).attach(family)
    trained(family, {"rank": 2, "targets": "all", "text": TEXT})
    for part, own in family.tensors().items():
        assert own.keys() == before[part].keys()
        assert all(torch.equal(tensor, before[part][name]) for name, tensor in own.items())


@pytest.mark.parametrize("name", BASES)
def test_comfy_files_are_kohyas_under_other_names(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base: Path = request.getfixturevalue(BASES[name])
    family = family_of(name, base)
    adapter = {"kind": "dora", "rank": 2, "targets": CONV, "text": TEXT}
    parts = trained(family, adapter)
    exporting.export(tmp_path, "run", family, parts, arguments(base, adapter, ["kohya", "comfy"]))
    kohya, comfy = (load_file(tmp_path / file) for file in ("run.safetensors", "run_comfy.safetensors"))
    assert family.clients.comfy is not None
    for part in parts:
        for key in part.modules():
            mine, theirs = family.clients.kohya(*key), family.clients.comfy(*key)
            assert theirs.startswith(("diffusion_model.", "text_encoder.text_model.", "text_encoder_2.text_model."))
            for end in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"):
                assert torch.equal(kohya.pop(f"{mine}.{end}"), comfy.pop(f"{theirs}.{end}"))
    assert not kohya
    assert not comfy


@pytest.mark.parametrize(
    ("layout", "adapter", "said"),
    [
        (
            "diffusers",
            {"kind": "loha", "rank": 2},
            r"diffusers, which cannot say LoHa \(denoiser .* more\); take kohya",
        ),
        ("diffusers", {"kind": "lokr", "rank": 2}, "cannot say LoKr"),
        ("diffusers", {"kind": "full"}, "cannot say differences of weights"),
        ("diffusers", {"kind": "dora", "rank": 2}, r"over the input axis .*or have the nearest LoRA written"),
        (
            "diffusers",
            {"kind": "dora", "rank": 2, "axis": "output", "text": TEXT},
            r"of text encoders.*\(text_encoder ",
        ),
        ("peft", {"kind": "dora", "rank": 2}, "peft, which cannot say DoRA over the input axis"),
        ("peft", {"kind": "oft", "block": 8}, "peft, which cannot say differences of weights"),
    ],
)
def test_a_layout_without_the_words_refuses_before_anything_is_trained(
    tiny_base: Path, tmp_path: Path, layout: str, adapter: dict[str, Any], said: str
) -> None:
    family = family_of("sd15", tiny_base)
    parts = trained(family, adapter, size=0.0)
    args = arguments(tiny_base, adapter, ["kohya", layout])
    for refused in (
        lambda: exporting.check(family, parts, args),
        lambda: exporting.export(tmp_path, "run", family, parts, args),
    ):
        with pytest.raises(exporting.ExportError, match=said):
            refused()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"export": {"layouts": ["embedding"]}}, "text.tokens is 0"),
        ({"export": {"layouts": ["kohya"]}, "text": {"tokens": 1}}, "add embedding"),
        ({"export": {"layouts": ["kohya", "kohya"]}}, "names kohya twice"),
        ({"export": {"layouts": ["embedding"]}, "text": {"tokens": 1}}, "add kohya"),
        ({"export": {"layouts": ["peft"]}, "adapter": {"kind": "none"}, "text": {"tokens": 1}}, "take embedding"),
        ({"export": {"dora": "lora"}}, "adapter.kind is not dora"),
        ({"export": {"dora_rank": 4}}, "set dora to lora"),
        ({"export": {"author": "A. Painter", "metadata": "minimal"}}, "author is given, but metadata is minimal"),
        ({"export": {"thumbnail": True, "metadata": "none"}}, "thumbnail is given, but metadata is none"),
    ],
)
def test_options_that_would_do_nothing_are_mistakes(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainArgs.model_validate({"data": {"source": "pictures"}, **tree})


@pytest.mark.parametrize("axis", ["input", "output"])
def test_dora_is_written_as_the_nearest_lora(tiny_base: Path, tmp_path: Path, axis: str) -> None:
    adapter = {"kind": "dora", "rank": 2, "axis": axis, "targets": CONV}
    family = family_of("sd15", tiny_base)
    parts = trained(family, adapter, size=0.05)
    off: dict[int, float] = {}
    for rank in (2, 8, 1000):
        args = arguments(tiny_base, adapter, ["kohya", "diffusers", "peft"], dora="lora", dora_rank=rank)
        exporting.export(tmp_path, "run", family, parts, args)
        state = load_file(tmp_path / "run.safetensors")
        assert not any("dora" in key for key in state)
        squares = [0.0, 0.0]
        for key, change in parts[0].differences().items():
            name = family.clients.kohya(*key)
            down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
            assert float(state[f"{name}.alpha"]) == len(down) <= rank
            got = (up.flatten(1) @ down.flatten(1)).reshape(change.weight.shape)
            squares[0] += float((got - change.weight).square().sum())
            squares[1] += float(change.weight.square().sum())
        off[rank] = (squares[0] / squares[1]) ** 0.5
    assert off[2] > off[8] > off[1000]
    assert off[1000] < 1e-5
    assert "is lost at worst" in (tmp_path / "README.md").read_text()


def test_the_nearest_lora_is_by_the_largest_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(6, 4, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(18, 4, generator=generator))
    change = (left * torch.tensor([4.0, 2.0, 1.0, 0.0]) @ right.T).reshape(6, 2, 3, 3)
    lora, off = nearest_lora(change, 2)
    assert (lora.down.shape, lora.up.shape, lora.alpha) == ((2, 2, 3, 3), (6, 2, 1, 1), 2.0)
    assert off == pytest.approx((1 / 21) ** 0.5, rel=1e-5)
    assert float((difference(lora, change) - change).norm()) == pytest.approx(1.0, rel=1e-5)
    assert nearest_lora(torch.zeros(3, 5), 2)[1] == 0.0


@pytest.mark.parametrize(("export", "model"), [("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "bf16"), (None, "bf16")])
def test_the_files_precision_is_chosen_on_its_own(
    tiny_base: Path, tmp_path: Path, export: str | None, model: str
) -> None:
    family = family_of("sd15", tiny_base, dtype=model)
    adapter = {"rank": 2}
    args = arguments(tiny_base, adapter, ["kohya", "diffusers", "peft", "checkpoint"], dtype=export)
    args = args.model_copy(update={"model": args.model.model_copy(update={"dtype": model})})
    exporting.export(tmp_path, "run", family, trained(family, adapter), args)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[export or model]
    for file in tmp_path.rglob("*.safetensors"):
        state = load_file(file)
        assert {t.dtype for t in state.values() if t.ndim} == {wanted}, file
        assert {t.dtype for key, t in state.items() if key.endswith(".alpha")} <= {torch.float32}


def test_what_overflows_in_half_precision_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    family = family_of("sd15", tiny_base)
    parts = trained(family, {"rank": 2})
    next(iter(parts[0].state_dict().values()))[0, 0] = 1e5
    args = arguments(tiny_base, {"rank": 2}, ["kohya"], dtype="fp16")
    with pytest.raises(exporting.ExportError, match="1 tensors are not finite in float16"):
        exporting.export(tmp_path, "run", family, parts, args)
    assert not list(tmp_path.iterdir())


def test_files_are_what_safetensors_reads_with_the_right_hash(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3).T,
        "a": torch.tensor(0.1, dtype=torch.float64),
        "ids": torch.arange(3),
        "empty": torch.zeros(0),
    }
    said = {"who": "é", "modelspec.hash_sha256": "", "sshs_model_hash": "old"}
    _store(tmp_path / "x.safetensors", Tensors(tensors, said), torch.bfloat16)
    state = load_file(tmp_path / "x.safetensors")
    assert {key: t.dtype for key, t in state.items()} == {
        "a": torch.float32, "b": torch.bfloat16, "ids": torch.int64, "empty": torch.bfloat16
    }  # fmt: skip
    assert torch.equal(state["b"].float(), tensors["b"])
    assert float(state["a"]) == pytest.approx(0.1)
    data = (tmp_path / "x.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    facts = json.loads(data[8:start])["__metadata__"]
    digest = hashlib.sha256(data[start:]).hexdigest()
    assert facts == {"who": "é", "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}


def test_layouts_of_a_run_are_kohya_and_embedding_unless_chosen() -> None:
    assert ExportArgs.model_validate({}).for_layers() == ("kohya",)
    assert ExportArgs.model_validate({"layouts": ["peft", "embedding", "comfy"]}).for_layers() == ("peft", "comfy")
