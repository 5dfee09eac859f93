"""Regularisers of token rows: what keeps them, and what the text encoder makes of them, like those of other words.

Shapes: n rows, V words, D row width; B prompts, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ORDINARY = (
    "a photo of a person",
    "a picture of a house by the sea",
    "a painting of a red flower",
    "a close up of a dog on the grass",
    "two cars in a street at night",
)
"""Prompts whose mean condition says what is usual."""


def std_penalty(rows: Tensor, target: Tensor) -> Tensor:
    """Mean squared relative distance of the rows' std from `target`."""
    return ((rows.std(dim=1) / target - 1) ** 2).mean()


@dataclass(frozen=True)
class Covariance:
    """How the rows of a table vary: their mean [D], and their covariance over its trace [D, D]."""

    mean: Tensor
    shape: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Covariance:
        """That of [V, D], in float32."""
        mean = table.float().mean(0)
        centred = table.float() - mean
        covariance = centred.T @ centred / len(table)
        return cls(mean, covariance / covariance.trace())

    def distance(self, rows: Tensor) -> Tensor:
        """Squared Frobenius distance of the rows' covariance about the table's mean, relative to the table's own.

        Both at the same total variance, because a few rows span few directions: their plain covariance gets closest
        to the table's when they shrink, and their size is for the std to hold. Never 0 for fewer rows than D; low
        where they point to where the table varies. Rows that are all at the mean have none: not a number.
        """
        centred = rows.float() - self.mean.to(rows.device)
        shape = self.shape.to(rows.device)
        total = (centred**2).sum()
        own = ((centred @ centred.T) ** 2).sum() / total**2  # of the squared entries, by the smaller matrix
        shared = (centred @ shape * centred).sum() / total
        return (own - 2 * shared) / (shape**2).sum() + 1


def condition_norm(hidden: Tensor) -> Tensor:
    """[B]: the norm of each prompt's mean hidden state, of [B, L, D]."""
    return hidden.float().mean(1).norm(dim=-1)


def condition_penalty(hidden: Tensor, target: Tensor) -> Tensor:
    """Mean squared relative distance of the prompts' condition norms from `target`."""
    return ((condition_norm(hidden) / target - 1) ** 2).mean()
