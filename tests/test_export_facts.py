"""What stands beside and inside exported files: headers, thumbnail, workflow, README, and the measured strength."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTokenizer

from trainer import export as exporting
from trainer import registry
from trainer.adapters.lora import LoRA
from trainer.adapters.textual_inversion import TextualInversion
from trainer.args import ModelArgs, TrainArgs
from trainer.concepts import ordinary
from trainer.export.facts import TAGS, tags
from trainer.export.likeness import best
from trainer.models import FAMILIES

CPU = torch.device("cpu")
# Inputs of ComfyUI's nodes: a link names the number of the output of the node that it comes from.
NODES: dict[str, dict[str, Any]] = {
    "CheckpointLoaderSimple": {"ckpt_name": str},
    "LoraLoader": {
        "model": "MODEL", "clip": "CLIP", "lora_name": str, "strength_model": float, "strength_clip": float
    },
    "ModelSamplingDiscrete": {"model": "MODEL", "sampling": str, "zsnr": bool},
    "CLIPTextEncode": {"text": str, "clip": "CLIP"},
    "EmptyLatentImage": {"width": int, "height": int, "batch_size": int},
    "KSampler": {
        "model": "MODEL", "seed": int, "steps": int, "cfg": float, "sampler_name": str, "scheduler": str,
        "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT", "denoise": float,
    },
    "VAEDecode": {"samples": "LATENT", "vae": "VAE"},
    "SaveImage": {"images": "IMAGE", "filename_prefix": str},
}  # fmt: skip
OUTPUTS: dict[str, tuple[str, ...]] = {
    "CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"),
    "LoraLoader": ("MODEL", "CLIP"),
    "ModelSamplingDiscrete": ("MODEL",),
    "CLIPTextEncode": ("CONDITIONING",),
    "EmptyLatentImage": ("LATENT",),
    "KSampler": ("LATENT",),
    "VAEDecode": ("IMAGE",),
}


def made(folder: Path) -> exporting.Made:
    samples: dict[float, list[Path]] = {}
    for strength, colour in ((0.5, "blue"), (1.0, "red")):
        path = folder / f"sample_{strength:g}.png"
        Image.new("RGB", (600, 300), colour).save(path)
        samples[strength] = [path]
    return exporting.Made(
        steps=30,
        batch=4,
        captions={"TOK": ["TOK, red, star", "TOK, red"], "KIT": ["a cat"]},
        buckets={(512, 768): 2, (512, 512): 1},
        date="2026-01-02T03:04:05+00:00",
        digests={"args": "0123", "dataset": "4567"},
        samples=samples,
    )


def exported(
    base: Path,
    folder: Path,
    family: str = "sd15",
    name: str = "my.run",
    *,
    known: exporting.Made | None = None,
    **tree: Any,
) -> tuple[Path, dict[str, str]]:
    """The folder, and the kohya file's metadata."""
    args = TrainArgs.model_validate(
        {"data": {"source": "/home/somebody/pictures"}, "model": {"base": str(base)}, "text": {"tokens": 2}, **tree}
    )
    on = registry.load(FAMILIES, family, "family").load(ModelArgs(base=str(base)), CPU)
    rows, lora = TextualInversion(args.text, "TOK", seed=0), LoRA(args.adapter, seed=0)
    rows.attach(on)
    lora.attach(on)
    out = folder / "export"
    exporting.export(out, name, on, [rows, lora], args, known)
    with safe_open(out / f"{name}.safetensors", framework="pt") as file:
        return out, dict(file.metadata() or {})


def test_full_headers_hold_what_programs_show(tiny_base: Path, tmp_path: Path) -> None:
    export = {"author": "A. Painter", "thumbnail": True}
    out, said = exported(tiny_base, tmp_path, known=made(tmp_path), export=export)
    expected = {
        "modelspec.author": "A. Painter",
        "modelspec.date": "2026-01-02T03:04:05+00:00",
        "modelspec.prediction_type": "v",
        "ss_steps": "30",
        "ss_epoch": "40",  # 120 showings of 3 pictures
        "ss_num_train_images": "3",
        "ss_network_module": "networks.lora",
        "ss_sd_model_name": "tiny",
        "tempera.args_digest": "0123",
        "tempera.dataset_digest": "4567",
    }
    assert expected.items() <= said.items()
    assert json.loads(said["ss_tag_frequency"]) == {"TOK": {"TOK": 2, "red": 2, "star": 1}, "KIT": {"a cat": 1}}
    assert json.loads(said["ss_bucket_info"])["buckets"]["0"] == {"resolution": [512, 768], "count": 2}
    assert json.loads(said["ss_dataset_dirs"])["TOK"]["img_count"] == 2
    start, data = said["modelspec.thumbnail"].split(",")
    assert start == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (256, 128))
    assert "ss_sd_model_hash" not in said, "nobody knows it"
    for file in out.iterdir():
        content = file.read_bytes()
        assert b"somebody" not in content, file
        assert str(tmp_path).encode() not in content, file
        assert str(tiny_base.parent).encode() not in content, file


def test_minimal_headers_say_what_the_file_is_and_no_more(tiny_base: Path, tmp_path: Path) -> None:
    _, said = exported(tiny_base, tmp_path, known=made(tmp_path), export={"metadata": "minimal"})
    assert {key for key in said if key.startswith("ss_")} == {
        "ss_base_model_version", "ss_output_name", "ss_network_module", "ss_network_dim", "ss_network_alpha"
    }  # fmt: skip
    assert {key for key in said if key.startswith("modelspec.")} == {
        f"modelspec.{key}"
        for key in (
            "sai_model_spec", "architecture", "implementation", "title", "resolution", "prediction_type",
            "trigger_phrase", "hash_sha256",
        )
    }  # fmt: skip
    assert not any(key.startswith("tempera.") for key in said)


def test_no_headers_but_what_a_layout_needs(tiny_base: Path, tmp_path: Path) -> None:
    layouts = ["kohya", "diffusers", "embedding"]
    out, said = exported(tiny_base, tmp_path, known=made(tmp_path), export={"metadata": "none", "layouts": layouts})
    assert said == {}
    with safe_open(out / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 8
    with safe_open(out / "my_run_embedding.safetensors", framework="pt") as file:
        assert not file.metadata()


def test_only_so_many_tags_go_into_a_header() -> None:
    captions = [f"often, word{n}" for n in range(2 * TAGS)]
    found = tags(captions)
    assert len(found) == TAGS
    assert found["often"] == 2 * TAGS


@pytest.mark.parametrize(
    ("family", "base", "layouts"),
    [
        ("sd15", "tiny_base", []),
        ("sdxl", "tiny_sdxl", []),
        ("sd15", "tiny_base_deep", ["comfy", "embedding"]),
        ("sd2", "tiny_sd2", ["checkpoint", "embedding"]),
    ],
)
def test_the_workflow_is_one_that_comfyui_loads(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, base: str, layouts: list[str]
) -> None:
    """Every node's inputs are all there, of the right type, and links lead to an output of that kind."""
    out, name = tmp_path / "export", "my.run"
    tree: dict[str, Any] = {
        "data": {"source": "pictures"},
        "model": {"base": str(request.getfixturevalue(base))},
        "text": {"tokens": 2},
        "sample": {"prompts": ["a photo of {trigger} and TOKEN"], "negative": "blur"},
        "export": {"layouts": layouts},
    }
    args = TrainArgs.model_validate(tree)
    on = registry.load(FAMILIES, family, "family").load(args.model, CPU)
    adapters = [TextualInversion(args.text, "TOK", seed=0), LoRA(args.adapter, seed=0)]
    for adapter in adapters:
        adapter.attach(on)
    exporting.export(out, name, on, adapters, args)
    nodes: dict[str, Any] = json.loads((out / "my.run_comfyui.json").read_text(encoding="utf-8"))
    for node in nodes.values():
        wanted = NODES[node["class_type"]]
        assert node["inputs"].keys() == wanted.keys()
        for key, kind in wanted.items():
            given = node["inputs"][key]
            if isinstance(kind, str):
                source, output = given
                assert OUTPUTS[nodes[source]["class_type"]][output] == kind
            else:
                assert type(given) is kind, key
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
    texts = [node["inputs"]["text"] for node in nodes.values() if node["class_type"] == "CLIPTextEncode"]
    assert texts == ["a photo of embedding:my_run_embedding and TOKEN", "blur"]
    assert ("LoraLoader" in kinds) == ("checkpoint" not in layouts)
    file = kinds["LoraLoader"]["lora_name"] if "LoraLoader" in kinds else kinds["CheckpointLoaderSimple"]["ckpt_name"]
    assert (out / file).is_file()
    v = on.path.target == "v_prediction" and family != "sdxl"
    assert ("ModelSamplingDiscrete" in kinds) == v


def test_strength_is_measured_where_the_base_has_a_clip(tiny_base: Path, tmp_path: Path) -> None:
    known = made(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    red = tmp_path / "red.png"
    Image.new("RGB", (40, 40), "red").save(red)
    found = exporting.measure(tiny_base / "clip", known.samples, ["a red star"], [red], tokenizer)
    assert found[1.0].pictures == pytest.approx(1.0, abs=1e-5), "the samples are the training picture"
    assert found[0.5].pictures < found[1.0].pictures - 1e-4
    assert all(-1 <= like.prompts <= 1 for like in found.values())
    measured = exporting.Made(samples=known.samples, likeness={0.5: found[1.0], 1.0: found[0.5]})
    worse = exporting.Likeness(found[1.0].pictures - 1, found[1.0].prompts)
    measured = exporting.Made(samples=known.samples, likeness={0.5: found[1.0], 1.0: worse})
    out, _ = exported(tiny_base, tmp_path, known=measured)
    note = (out / "README.md").read_text(encoding="utf-8")
    assert "- strength: 0.5. Measured on this run's samples" in note
    assert "<lora:my.run:0.5>" in note
    assert '"strength_model": 0.5' in (out / "my.run_comfyui.json").read_text(encoding="utf-8")
    assert (out / "my.run.png").read_bytes() == known.samples[0.5][0].read_bytes()


def test_without_a_measurement_nothing_is_recommended_but_what_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    out, _ = exported(tiny_base, tmp_path, known=made(tmp_path))
    note = (out / "README.md").read_text(encoding="utf-8")
    assert "strength: 1, with which it was trained; no other was measured" in note
    assert "<lora:my.run:1>" in note
    assert "![a sample](my.run.png)" in note


def test_the_best_strength_is_the_one_nearest_to_1_among_equals() -> None:
    like = exporting.Likeness
    assert best({0.5: like(0.7, 0.3), 1.0: like(0.9, 0.3), 1.5: like(0.9, 0.305)}) == 1.0
    assert best({0.5: like(0.9, 0.3), 1.0: like(0.7, 0.3)}) == 0.5
    assert best({0.8: like(0.9, 0.3), 1.2: like(0.9, 0.3)}) == 0.8


def test_prompts_for_clip_have_class_words_for_triggers() -> None:
    def data(**options: Any) -> Any:
        return TrainArgs.model_validate({"data": {"source": "x", **options}}).data

    assert ordinary("a photo of TOK on TOKEN", data(class_words=["dog", "hound"])) == "a photo of dog on TOKEN"
    assert ordinary("a photo of TOK", data(mode="style")) == "a photo of"
