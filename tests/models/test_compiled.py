"""Blocks that torch compiles: what is refused, and, slowly, that they compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from trainer import sampler
from trainer.args import ModelArgs, TrainArgs
from trainer.models.sd15 import SD15
from trainer.run import opened
from trainer.types import BaseModelError


def test_packed_layers_cannot_be_compiled() -> None:
    with pytest.raises(ValidationError, match="torch cannot compile layers that are packed"):
        ModelArgs.model_validate({"compile": "blocks", "packed": "on"})
    assert ModelArgs.model_validate({"compile": "blocks"}).packing == "off"


def test_without_a_compiler_it_is_refused_at_once(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(BaseModelError, match=r"torch cannot compile for cpu here: it needs a C\+\+ compiler"):
        SD15.load(ModelArgs.model_validate({"base": str(tiny_base), "compile": "blocks"}), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"quantise": "int8"}, {"gradient_checkpointing": True}], ids=str)
def test_compiled_blocks_learn_and_draw_the_same(
    more: dict[str, Any], tiny_base: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    losses: dict[str, list[float]] = {}
    pictures: dict[str, Any] = {}
    for how in ("none", "blocks"):
        args = TrainArgs.model_validate(
            {
                "data": {"source": str(tiny_pictures), "resolution": 32},
                "model": {"base": str(tiny_base), "compile": how, **more},
                "text": {"tokens": 1},
                "sample": {"steps": 1},
                "hooks": {"tensorboard": False},
                "runtime": {"out": str(tmp_path), "name": how, "steps": 4, "batch_size": 2, "device": "cpu"},
            }
        )
        with opened(args) as session:
            losses[how] = [step.loss for step in session.steps()]
            family: Any = session.run.family
            compiled = [m for m in family.denoiser.modules() if m._compiled_call_impl is not None]
            assert bool(compiled) == (how == "blocks")
            drawn = sampler.generate(family, ["a red star"], seeds=[0], steps=2, guidance=2.0)
            pictures[how] = torch.frombuffer(bytearray(drawn[0].tobytes()), dtype=torch.uint8).float()
    assert losses["blocks"] == pytest.approx(losses["none"], rel=1e-5)
    assert len(set(losses["none"])) == 4
    assert (pictures["blocks"] - pictures["none"]).abs().max() <= 2
