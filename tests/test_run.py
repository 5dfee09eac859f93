"""Precision: every dtype trains, and fp16's small gradients arrive as fp32's do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer import cli, run


def gradients(base: Path, pictures: Path, out: Path, dtype: str) -> dict[str, torch.Tensor]:
    """Of the first update, before clipping."""
    tree = {
        "data": {"source": str(pictures)},
        "model": {"base": str(base), "dtype": dtype},
        "sample": {"strengths": []},
        "text": {"tokens": 1},
        "runtime": {"out": str(out), "name": dtype, "steps": 2, "batch_size": 2, "device": "cpu"},
    }
    with run.opened(cli.validate(tree)) as session:
        found: dict[str, torch.Tensor] = {}

        class Keep(run.Hook):
            def on_gradients(self, run: run.Run, update: int) -> dict[str, float]:
                for named in run.components.values():
                    found.update({name: p.grad.clone() for name, p in named if update == 0 and p.grad is not None})
                return {}

        session.run.hooks = [Keep(run.Context(session.dir, session.args))]
        steps = list(session.steps())
        assert all(p.dtype == torch.float32 for named in session.run.components.values() for _, p in named)
    assert len(steps) == 2
    return found


@pytest.fixture(scope="module")
def exact(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    from conftest import draw_pictures

    out = tmp_path_factory.mktemp("fp32")
    return gradients(tiny_base, draw_pictures(out / "pictures"), out, "fp32")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_gradients_of_every_precision_agree(
    exact: dict[str, torch.Tensor], tiny_base: Path, tiny_pictures: Path, tmp_path: Path, dtype: str
) -> None:
    rough = gradients(tiny_base, tiny_pictures, tmp_path, dtype)
    assert rough.keys() == exact.keys()
    one, two = (torch.cat([g[name].flatten() for name in exact]) for g in (exact, rough))
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.98
    assert two.norm() / one.norm() == pytest.approx(1.0, abs=0.05)


def test_fp16_carries_gradients_that_half_precision_cannot_hold() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    engine = run.Engine(cli.validate({"data": {"source": "x"}, "runtime": {"device": "cpu"}}).runtime, "fp16")
    engine.watch(parameter)
    for _ in range(2):  # two micro-batches add up
        engine.backward((parameter.half().float() * 1e-8).sum())
    engine.release()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == pytest.approx([2e-8] * 3, rel=0.02)
