"""What is asked for and is not there: the whole sentences, which say what was given, what is allowed, what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.__main__ import main
from trainer.args import TrainArgs


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line, and no traceback before it."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1] + "\n"


@pytest.fixture
def door(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> list[str]:
    """A command line that trains."""
    quick = ("--runtime.steps", "4", "--runtime.device", "cpu", "--adapter.rank", "2", "--sample.steps", "1")
    return [
        "object",
        str(tiny_pictures),
        "--model.base",
        str(tiny_base),
        "--runtime.out",
        str(tmp_path / "runs"),
        *quick,
    ]


# What is asked for and is not there -> the whole sentence: what was given, what is allowed, what to do.
NOT_THERE: dict[str, tuple[list[str], str]] = {
    "a layer that is not there": (
        ["--adapter.targets", "attention+ff", "--adapter.match", '["down_blocks.9.*to_q"]'],
        "adapter.match 'down_blocks.9.*to_q' matches no layer; near it are "
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q, "
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q, "
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_q. Write it as layers are named here, or leave it out",
    ),
    "a pattern that matches nothing": (
        ["--adapter.exclude", '["nothere"]'],
        "adapter.exclude 'nothere' matches no layer; there are down_blocks.0.resnets.0.conv1, "
        "down_blocks.0.resnets.0.conv2, down_blocks.0.downsamplers.0.conv and 68 more. Write it as layers are named "
        "here, or leave it out",
    ),
    "a rule that matches nothing": (
        ["--optim.rules", '[{"match": "down_blocks.9.*", "lr_scale": 0.5}]'],
        "optim.rules: 'down_blocks.9.*' matches nothing that is trained; near are down_blocks.1, down_blocks.0, "
        "up_blocks.1, up_blocks.0. Write it as they are named here, or leave the rule out",
    ),
    "a rank of 0": (
        ["--adapter.rank", "0"],
        "adapter.rank: input should be greater than or equal to 1 (given: '0')",
    ),
    "a rank of 0 for some layers": (
        ["--adapter.ranks", '{"to_q": 0}'],
        "adapter.ranks.to_q: input should be greater than or equal to 1 (given: 0)",
    ),
    "a rank over the layer's width": (
        ["--adapter.rank", "64"],
        "the rank is above the layer's width in down_blocks.0.resnets.0.conv1 (rank 64, at most 16), "
        "down_blocks.0.resnets.0.conv2 (rank 64, at most 16), down_blocks.0.downsamplers.0.conv (rank 64, at most 16) "
        "and 68 more; lower adapter.rank, or give these layers a rank of their own in adapter.ranks",
    ),
    "a rank over a text encoder's width": (
        ["--adapter.text.train", "--adapter.text.rank", "512"],
        "the rank is above the layer's width in encoder.layers.0.self_attn.k_proj (rank 512, at most 32), "
        "encoder.layers.0.self_attn.v_proj (rank 512, at most 32), encoder.layers.0.self_attn.q_proj (rank 512, at "
        "most 32) and 5 more; give a lower adapter.text.rank",
    ),
    "a LoRA of another family to start from": (
        ["--adapter.start", "{other}"],
        "adapter.start: {other} changes 40 layers that the base has not ({3}); is it for another kind of base?",
    ),
    "a LoRA of another family to merge": (
        ["--model.merge", '{"{other}": 1.0}'],
        "model.merge: {other} changes 40 layers that the base has not ({3}); is it for another kind of base?",
    ),
    "an optimizer that does not exist": (
        ["--optim.adapter.name", "adamww"],
        "optim.adapter.name 'adamww' is unknown; did you mean adamw? (allowed: adamw, adam, sgd, ",
    ),
    "an optimizer option that does not exist": (
        ["--optim.adapter.name", "sgd", "--optim.adapter.options", "momentumm=0.9"],
        "optim.adapter.options has momentumm, which sgd has not; did you mean momentum? (it has momentum, dampening, "
        "nesterov, maximize, foreach, differentiable, fused)",
    ),
}


@pytest.fixture(scope="module")
def of_sdxl(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for SDXL, as a run exports it."""
    from trainer import export
    from trainer.adapters.lora import LoRA
    from trainer.models.sdxl import SDXL

    tree = {"data": {"source": "x"}, "model": {"base": str(tiny_sdxl)}, "adapter": {"rank": 2}}
    args = TrainArgs.model_validate(tree)
    family, lora = SDXL.load(args.model, torch.device("cpu")), LoRA(args.adapter, seed=0)
    lora.attach(family)
    folder = tmp_path_factory.mktemp("sdxl")
    export.export(folder, "xl", family, [lora], args)
    return folder / "xl.safetensors"


@pytest.mark.parametrize("what", NOT_THERE)
def test_what_is_not_there_is_named_with_what_is(
    what: str, door: list[str], of_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = NOT_THERE[what]
    assert main([*door, *(word.replace("{other}", str(of_sdxl)) for word in change)]) == 2
    sentence = one_sentence(capsys)
    expected = [part.replace("{other}", str(of_sdxl)) for part in said.split("{3}")]
    assert sentence.startswith(f"train.py: error: {expected[0]}")
    assert len(expected) == 1 or sentence.endswith(f"{expected[1]}\n")
    assert not (tmp_path / "runs" / "run").exists(), "the name stays free for the next try"
