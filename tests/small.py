"""A family of a few hundred parameters with a low-rank adapter and token rows: real modules, for fast loop tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trainer.args import ComponentOptim, ObjectiveArgs
from trainer.dataset import Dataset, Item
from trainer.loop import Run
from trainer.objectives.denoise import Denoise
from trainer.optim import Rates, build
from trainer.path import NoisePath
from trainer.types import Cond

WORDS = ["", "a", "red", "TOK"]


def noise(size: tuple[int, int], spread: float, seed: int = 0) -> Image.Image:
    """A grey picture of normal noise around 128, the same each time, as PIL's effect_noise is not."""
    values = np.random.default_rng(seed).normal(128, spread, size[::-1])
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Conv2d(2, 8, 3, padding=1)
        self.text = nn.Linear(6, 8)
        self.out = nn.Conv2d(8, 2, 3, padding=1)
        self.extra: nn.Module | None = None

    def forward(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        level = t.to(xt).reshape(-1, 1) / 1000
        text = cond.hidden.mean(1)
        update = self.extra(text) if self.extra is not None else 0.0
        features = self.picture(xt) + (self.text(text) + update + level)[:, :, None, None]
        return self.out(torch.tanh(features))


class Words(nn.Module):
    """Frozen word vectors, and trainable ones for the trigger when `rows` is there."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(len(WORDS), 6)
        self.rows: nn.Parameter | None = None

    def forward(self, captions: Sequence[str]) -> Tensor:
        rows = [torch.stack([self.word(word) for word in (caption.split() + [""] * 4)[:4]]) for caption in captions]
        return torch.stack(rows)

    def word(self, word: str) -> Tensor:
        if word == "TOK" and self.rows is not None:
            return self.rows[0]
        return self.table.weight[WORDS.index(word)]


class SmallFamily:
    name = "small"

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.denoiser = Denoiser().requires_grad_(False)
            self.words = Words().requires_grad_(False)
        self.path = NoisePath(torch.linspace(0.99, 0.01, 1000), "v_prediction")

    def encode(self, captions: Sequence[str]) -> Cond:
        return Cond(self.words(captions))

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.denoiser(xt, t, cond)


class LowRank(nn.Module):
    """text -> up(down(dropout(text))), zero at first."""

    component = "adapter"

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.down = nn.Linear(6, 3, bias=False)
        self.up = nn.Linear(3, 8, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, text: Tensor) -> Tensor:
        return self.up(self.down(self.dropout(text)))

    def attach(self, family: Any) -> list[tuple[str, nn.Parameter]]:
        family.denoiser.extra = self
        return list(self.named_parameters())

    def penalty(self) -> Tensor | None:
        return None


class Rows:
    component = "rows"

    def __init__(self) -> None:
        self.rows = nn.Parameter(torch.full((1, 6), 0.1))

    def attach(self, family: Any) -> list[tuple[str, nn.Parameter]]:
        family.words.rows = self.rows
        return [("rows", self.rows)]

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self.rows.detach()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rows.data.copy_(state["rows"])

    def penalty(self) -> Tensor | None:
        return 0.01 * (self.rows**2).mean()


class CPU:
    name = "engine"
    device = torch.device("cpu")
    rank = 0
    processes = 1

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gathered(self, rows: Sequence[Any]) -> Sequence[Any]:
        return rows

    def average(self, parameters: Sequence[Any]) -> None:
        """Of one process."""

    def settled(self, finite: bool) -> bool:
        return finite

    def state_dict(self) -> Mapping[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """There is none."""


def items(sizes: Sequence[tuple[int, int]]) -> list[Item]:
    """One picture of each bucket size, named p0, p1, ..."""
    return [
        Item(Path(f"p{i}.png"), f"p{i}", f"{i:064x}", f"a {'red ' * (i % 2)}TOK", None, *size, size)
        for i, size in enumerate(sizes)
    ]


def latents(pictures: Sequence[Item], scale: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        item.name: torch.randn(2, item.bucket[1] // scale, item.bucket[0] // scale, generator=generator)
        for item in pictures
    }


def make_run(
    *,
    steps: int = 8,
    accumulate: int = 1,
    adapter: Mapping[str, Any] | None = None,
    rows: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    caption_dropout: float = 0.2,
    max_grad_norm: float = 1.0,
    hooks: Sequence[Any] = (),
    seed: int = 3,
    batch_size: int = 2,
) -> Run:
    """A new run with everything built anew, as a new process would."""
    torch.manual_seed(torch.seed())  # a run that leans on the global generator is found out
    family = SmallFamily()
    parts: list[Any] = [LowRank(dropout), Rows()]
    settings = {
        "adapter": ComponentOptim.model_validate({"lr": 1e-3, **(adapter or {})}),
        "rows": ComponentOptim.model_validate({"lr": 1e-2, **(rows or {})}),
    }
    components = {part.component: part.attach(family) for part in parts}

    pictures = items([(32, 32)] * 5 + [(48, 24)] * 2)
    return Run(
        family=family,  # type: ignore[arg-type]
        adapters=parts,
        components=components,
        optimizers={name: build(settings[name], components[name]) for name in components},
        lr={name: Rates(settings[name], steps, component=name) for name in components},
        dataset=Dataset(pictures, latents(pictures), batch_size=batch_size, seed=seed, caption_dropout=caption_dropout),
        objective=Denoise(ObjectiveArgs.model_validate(objective or {}), family.path, family.predict),
        encode=family.encode,
        hooks=hooks,
        steps=steps,
        accumulate=accumulate,
        max_grad_norm=dict.fromkeys(components, max_grad_norm),
        seed=seed,
        engine=CPU(),
    )


def tensors(run: Run) -> dict[str, Tensor]:
    """Copies of everything that is trained."""
    return {name: p.detach().clone() for named in run.components.values() for name, p in named}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equality to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes: the nearest thing to a full disk that needs no mount (POSIX only)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
