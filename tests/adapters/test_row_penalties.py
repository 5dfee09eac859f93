"""Regularisers of token rows: against numpy's covariance, and what they do to rows that learn by them alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.adapters.row_penalties import ORDINARY, Covariance, condition_norm, std_penalty
from trainer.adapters.textual_inversion import Concept, TextualInversion
from trainer.args import ModelArgs, TextArgs
from trainer.models.sd15 import SD15
from trainer.models.sdxl import SDXL


def words(count: int = 400, width: int = 6) -> Tensor:
    """A table that varies much in its first directions, about a mean that is not 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, width, generator=generator) * torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1]) + 1.0


def test_the_std_penalty_is_of_each_row() -> None:
    rows = torch.tensor([[0.0, 2.0], [0.0, 6.0], [5.0, 7.0]])  # stds sqrt(2), 3 sqrt(2), sqrt(2)
    torch.testing.assert_close(std_penalty(rows, torch.tensor(2.0).sqrt()), torch.tensor(4 / 3))


@pytest.mark.parametrize("count", [1, 2, 40])
def test_the_covariance_distance_is_frobenius_of_covariances_at_unit_trace(count: int) -> None:
    table, rows = words(), words(count + 7)[7:] * 5
    centred = (rows - table.mean(0)).double().numpy()
    own, usual = centred.T @ centred / count, np.cov(table.double().numpy(), rowvar=False)
    own, usual = own / np.trace(own), usual / np.trace(usual)
    expected = np.linalg.norm(own - usual) ** 2 / np.linalg.norm(usual) ** 2
    assert Covariance.of(table).distance(rows).item() == pytest.approx(expected, rel=1e-4)


def test_the_table_itself_is_at_no_distance_at_any_size() -> None:
    table = words()
    covariance = Covariance.of(table)
    for size in (0.1, 1.0, 10.0):
        assert covariance.distance((table - table.mean(0)) * size + table.mean(0)).item() == pytest.approx(0, abs=1e-5)


def test_rows_that_point_where_the_table_varies_are_closer() -> None:
    table = words()
    one = torch.eye(6) + table.mean(0)
    distances = [Covariance.of(table).distance(one[i : i + 1]).item() for i in range(6)]
    assert distances == sorted(distances)


def attached(base: Path, **options: float) -> tuple[SD15, TextualInversion]:
    family = SD15.load(ModelArgs(base=str(base)), torch.device("cpu"))
    inversion = TextualInversion(TextArgs.model_validate({"tokens": 2, "std_weight": 0.0, **options}), "TOK", 0)
    inversion.attach(family)
    return family, inversion


def lowered(inversion: TextualInversion) -> tuple[float, float]:
    """The penalty before and after 30 steps down it alone."""
    embedding = inversion._embeddings["text_encoder"]  # pyright: ignore[reportPrivateUsage]
    optimizer = torch.optim.Adam([embedding.rows], lr=0.02)
    values: list[float] = []
    for _ in range(31):
        penalty = inversion.penalty()
        assert penalty is not None
        values.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        assert embedding.rows.grad is not None
        optimizer.step()
    return values[0], values[-1]


def test_the_condition_is_held_at_the_norm_of_ordinary_prompts(tiny_base: Path) -> None:
    family, inversion = attached(tiny_base, condition_weight=2.0)
    usual = family.encode(ORDINARY).hidden.mean(1).norm(dim=1).mean()
    state = {"text_encoder.rows": inversion.rows()["text_encoder"] * 40}
    inversion.load_state_dict(state)
    own = family.encode(["a photo of TOK"]).hidden.mean(1).norm(dim=1)
    penalty = inversion.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(2.0 * (own / usual - 1).item() ** 2, rel=1e-4)
    before, after = lowered(inversion)
    assert after < before / 2
    torch.testing.assert_close(condition_norm(torch.ones(2, 5, 4)), torch.full((2,), 2.0))


def test_the_covariance_alone_trains_rows_and_weighs_as_told(tiny_base: Path) -> None:
    family, inversion = attached(tiny_base, covariance_weight=0.5)
    table = family.text_encoders["text_encoder"].get_input_embeddings().table.weight  # pyright: ignore
    before, after = lowered(inversion)
    assert after < before - 0.1
    penalty = inversion.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.5 * Covariance.of(table).distance(inversion.rows()["text_encoder"]).item())


def test_penalties_add_up_and_leave_with_the_adapter(tiny_base: Path) -> None:
    parts = {"std_weight": 0.1, "covariance_weight": 0.01, "condition_weight": 1.0}
    alone = [attached(tiny_base, **{name: weight})[1].penalty() for name, weight in parts.items()]
    _, inversion = attached(tiny_base, **parts)
    together = inversion.penalty()
    assert together is not None
    torch.testing.assert_close(together, torch.stack([part for part in alone if part is not None]).sum())
    inversion.detach()
    assert inversion.penalty() is None


def test_all_text_encoders_count_alike(tiny_sdxl: Path) -> None:
    family = SDXL.load(ModelArgs(base=str(tiny_sdxl)), torch.device("cpu"))
    tables = {key: encoder.get_input_embeddings().weight.detach() for key, encoder in family.text_encoders.items()}  # pyright: ignore
    args = TextArgs.model_validate({"tokens": 2, "std_weight": 0.5, "covariance_weight": 0.25})
    inversion = TextualInversion(args, "TOK", 0)
    first, _ = inversion.attach(family)
    first[1].data.mul_(3.0)  # (3 - 1)^2, and 0 for the other's
    far = [Covariance.of(tables[key]).distance(rows).item() for key, rows in inversion.rows().items()]
    penalty = inversion.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.5 * 4 / 2 + 0.25 * sum(far) / 2, rel=1e-4)


def test_the_condition_is_held_for_every_trigger(tiny_base: Path) -> None:
    family = SD15.load(ModelArgs(base=str(tiny_base)), torch.device("cpu"))
    usual = condition_norm(family.encode(ORDINARY).hidden).mean()
    args = TextArgs.model_validate({"tokens": 1, "std_weight": 0.0, "condition_weight": 2.0})
    inversion = TextualInversion(args, [Concept("KIT"), Concept("TOK")], 0)
    inversion.attach(family)
    own = condition_norm(family.encode(["a photo of KIT", "a photo of TOK"]).hidden)
    assert own[0] != own[1]
    penalty = inversion.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(2.0 * ((own / usual - 1) ** 2).mean().item(), rel=1e-4)
