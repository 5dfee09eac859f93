"""Runs with adapters of several kinds: all of them trained, kept small, gone on from, merged, and drawn with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer import cli, generate, run
from trainer.adapters.layered import Layers


def tree(base: Path, pictures: Path, out: Path, name: str, adapter: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {
        "data": {"source": str(pictures)},
        "model": {"base": str(base), **model},
        "adapter": adapter,
        "optim": {"adapter": {"lr": 0.1}, "text": {"lr": 0.1}},
        "sample": {"strengths": [], "steps": 1, "prompts": ["a red star"]},
        "hooks": {"tensorboard": False},
        "runtime": {"out": str(out), "name": name, "steps": 2, "batch_size": 2, "device": "cpu"},
    }


def trained(options: dict[str, Any]) -> tuple[Path, dict[str, torch.Tensor], dict[str, float]]:
    """The run directory, what changed of each trained tensor, the norm of each layer's update."""
    with run.opened(cli.validate(options)) as session:
        named = {name: p for part in session.run.components.values() for name, p in part}
        start = {name: p.detach().clone() for name, p in named.items()}
        list(session.steps())
        moved = {name: p.detach() - start[name] for name, p in named.items()}
        norms = {
            ".".join(key): change.weight.norm().item()
            for part in session.run.adapters
            if isinstance(part, Layers)
            for key, change in part.differences().items()
        }
        return session.dir.root, moved, norms


def test_text_encoders_are_trained_capped_gone_on_from_and_merged(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    adapter = {"rank": 2, "max_norm": 0.25, "text": {"train": True}}
    first, moved, norms = trained(tree(tiny_base, tiny_pictures, tmp_path, "first", adapter))
    assert all(change.any() for change in moved.values())
    assert any(name.startswith("text_encoder.") for name in moved)
    assert max(norms.values()) == pytest.approx(0.25, rel=1e-3)
    file = first / "export" / "first.safetensors"
    assert any(key.startswith("lora_te_text_model_") for key in load_file(file))
    weights = generate.find(first)
    painter = generate.Painter(generate.base_of([weights]), torch.device("cpu"))
    painter.use([generate.Weighted(painter.read(weights))])
    assert painter.draw(["a red star"], [1], generate.Look(steps=1))

    options = tree(tiny_base, tiny_pictures, tmp_path, "second", {**adapter, "start": str(first)})
    with run.opened(cli.validate(options)) as session:
        begun = {k: v.clone() for part in session.run.adapters for k, v in part.state_dict().items()}
    options = tree(tiny_base, tiny_pictures, tmp_path, "merged", adapter, merge={str(first): 0.5})
    with run.opened(cli.validate(options)) as session:
        merged = session.run.family.fingerprint("text_encoder")
    with run.opened(cli.validate(tree(tiny_base, tiny_pictures, tmp_path, "plain", {"rank": 2}))) as session:
        assert session.run.family.fingerprint("text_encoder") != merged
    exported = load_file(file)
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    for ours, theirs in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
        given = exported[f"{key}.{theirs}.weight"]
        assert torch.equal(begun[f"text_encoder.encoder.layers.0.self_attn.q_proj.{ours}.weight"], given)


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "loha", "rank": 2, "targets": "attention+ff+conv"},
        {"kind": "dora", "rank": 2, "targets": "attention+ff+conv", "text": {"train": True}},
        {"kind": "oft", "block": 8},
        {"kind": "full", "targets": "norm"},
    ],
    ids=lambda adapter: adapter["kind"],
)
def test_a_kind_trains_in_half_precision(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    root, moved, _ = trained(tree(tiny_base, tiny_pictures, tmp_path, "half", adapter, dtype="bf16"))
    still = [name for name, change in moved.items() if not change.any()]
    assert not still
    state = load_file(root / "export" / "half.safetensors")
    assert {tensor.dtype for tensor in state.values() if tensor.ndim} == {torch.bfloat16}


def test_a_merge_that_cannot_be_read_leaves_no_run(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    options = tree(tiny_base, tiny_pictures, tmp_path, "bad", {}, merge={str(tmp_path / "no.safetensors"): 1.0})
    said = r"model\.merge: .*no\.safetensors does not exist"
    with pytest.raises(run.RunError, match=said), run.opened(cli.validate(options)):
        pass
    assert not (tmp_path / "bad").exists()
