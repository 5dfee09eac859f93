"""Attention as plain products on a CPU in bfloat16: right within that precision, and torch's own elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from trainer.args import ModelArgs
from trainer.models import attention
from trainer.models.attention import Products
from trainer.models.sd15 import SD15

CPU = torch.device("cpu")


def layer(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Attention:
    torch.manual_seed(0)
    made = Attention(query_dim=24, cross_attention_dim=options.pop("cross", None), heads=2, dim_head=12, **options)
    return made.to(dtype).requires_grad_(False)


def given(dtype: torch.dtype, tokens: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, n, 24, generator=generator).to(dtype) for n in (tokens, 9))  # pyright: ignore


def taught(module: Attention, x: Tensor, seen: Tensor | None) -> list[Tensor]:
    """Output, and the gradients of what goes in."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, seen) if tensor is not None]
    out: Tensor = module(*inputs)
    along = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, along)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As many as there were calls of torch's fused attention."""
    calls: list[int] = []
    real: Any = F.scaled_dot_product_attention

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*given, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("cross", [None, 24], ids=["self", "cross"])
def test_numbers_are_those_of_double_precision(cross: int | None, fused: list[int]) -> None:
    x, other = given(torch.bfloat16)
    seen = other if cross else None
    exact = taught(layer(torch.bfloat16, cross=cross).double(), x.double(), None if seen is None else seen.double())
    module = layer(cross=cross)
    theirs = taught(module, x, seen)
    assert len(fused) == 2
    module.set_processor(Products())  # pyright: ignore[reportArgumentType]
    for mine, torchs, right in zip(taught(module, x, seen), theirs, exact, strict=True):
        errors = [((found.double() - right).norm() / right.norm()).item() for found in (mine, torchs)]
        assert errors[0] < 1.5e-2
        assert errors[0] < 3 * errors[1]
    assert len(fused) == 2


def test_other_cases_are_torchs(fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(torch.float32)
    x, _ = given(torch.float32)
    expected: Tensor = module(x)
    module.set_processor(Products())  # pyright: ignore[reportArgumentType]
    assert torch.equal(module(x), expected)
    narrow, mask = layer(), torch.zeros(2, 1, 40).bfloat16()
    expected = narrow(x.bfloat16(), attention_mask=mask)
    narrow.set_processor(Products())  # pyright: ignore[reportArgumentType]
    assert torch.equal(narrow(x.bfloat16(), attention_mask=mask), expected)
    assert len(fused) == 4
    narrow(x.bfloat16())
    assert len(fused) == 4
    monkeypatch.setattr(attention, "PAIRS", 40 * 40)
    narrow(x.bfloat16())
    assert len(fused) == 5


def processors(base: Path, **options: Any) -> set[type]:
    family = SD15.load(ModelArgs.model_validate({"base": str(base), **options}), CPU)
    return {type(processor) for processor in family.denoiser.attn_processors.values()}  # pyright: ignore


def test_a_base_in_bfloat16_on_a_cpu_has_them_unless_told_otherwise(tiny_base: Path) -> None:
    assert processors(tiny_base) == {AttnProcessor2_0}
    assert processors(tiny_base, dtype="bf16") == {Products}
    assert processors(tiny_base, dtype="bf16", attention="sdpa") == {AttnProcessor2_0}


def test_layers_of_another_form_keep_their_own() -> None:
    class Mixed(torch.nn.Module):
        set_processors: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.plain, self.normed = layer(), layer(norm_num_groups=2)

        def set_attn_processor(self, given: dict[str, Any]) -> None:
            for path, processor in given.items():
                self.get_submodule(path.removesuffix(".processor")).set_processor(processor)  # pyright: ignore

    mixed = Mixed()
    attention.use_products(mixed)
    assert isinstance(mixed.plain.processor, Products)
    assert isinstance(mixed.normed.processor, AttnProcessor2_0)
