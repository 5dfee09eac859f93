"""Precision, memory and attention of a family: what they change, and above all what they leave as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models import attention_processor
from torch import Tensor

from trainer import registry
from trainer.adapters.lora import LoRA
from trainer.args import AdapterArgs, ModelArgs
from trainer.models import FAMILIES, sniff
from trainer.models.latent import LatentFamily
from trainer.types import BaseModelError

CPU = torch.device("cpu")


def load(base: Path, **options: Any) -> LatentFamily:
    args = sniff.named(ModelArgs(base=str(base), **options))
    return registry.load(FAMILIES, args.family, "family").load(args, CPU)


def gradients(family: LatentFamily, kept: list[int]) -> dict[str, Tensor]:
    """Of a LoRA with dropout; `kept` gets the number of tensors that the forward pass left for the backward pass."""
    lora = LoRA(AdapterArgs.model_validate({"rank": 2, "dropout": 0.3, "targets": "attention+ff+conv"}), seed=0)
    named = lora.attach(family)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in named:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    xt, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([10, 900])
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return tensor

    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = family.predict(xt, t, family.encode(["a star", "a circle"])).square().mean()
    kept.append(count)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    lora.detach()
    return found


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sd2", "tiny_sdxl"])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(base: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(base)
    kept: list[int] = []
    plain = gradients(load(folder), kept)
    again = gradients(load(folder, gradient_checkpointing=True), kept)
    assert plain.keys() == again.keys()
    assert all(tensor.any() for tensor in plain.values())
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-7)
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sdxl_in_half_precision(tiny_sdxl: Path, dtype: str) -> None:
    """The base is narrow, what is trained is not, and results are those of the wide base to the rounding."""
    half, full = load(tiny_sdxl, dtype=dtype), load(tiny_sdxl)
    roots = (half.denoiser, half.vae, *half.text_encoders.values())
    assert len({parameter.dtype for root in roots for parameter in root.parameters()} - {torch.float32}) == 1
    assert {parameter.dtype for root in roots for parameter in root.parameters()} != {torch.float32}
    lora = LoRA(AdapterArgs.model_validate({"rank": 2}), seed=0)
    assert {parameter.dtype for _, parameter in lora.attach(half)} == {torch.float32}
    xt, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        pred = half.predict(xt, t, half.encode(["a star", ""]))
    assert pred.dtype == torch.float32
    pred.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in lora._parameters().items())
    with torch.no_grad():
        torch.testing.assert_close(pred, full.predict(xt, t, full.encode(["a star", ""])), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_vae_that_overflows_is_widened_while_it_encodes(tiny_sdxl: Path, dtype: str) -> None:
    family = load(tiny_sdxl, dtype=dtype)
    vae: Any = family.vae
    narrow = vae.dtype
    assert vae.config.force_upcast
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wide = AutoencoderKL.from_config(vae.config)
    wide.load_state_dict({name: tensor.float() for name, tensor in vae.state_dict().items()})
    with torch.no_grad():
        expected = wide.eval().encode(pixels).latent_dist.mean * wide.config.scaling_factor
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    mark = family.fingerprint("vae")
    assert torch.equal(family.encode_images(pixels), expected)
    assert vae.dtype == narrow
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert load(tiny_sdxl, dtype=dtype).fingerprint("vae") == mark == family.fingerprint("vae")


def test_activations_beyond_fp16_give_no_nan(tiny_sdxl: Path) -> None:
    family = load(tiny_sdxl, dtype="fp16")
    vae: Any = family.vae
    with torch.no_grad():
        vae.encoder.conv_in.weight.abs_().mul_(3e4)  # its sums pass 65504; the next norm brings them back
    pixels = torch.ones(1, 3, 32, 32)
    assert bool(family.encode_images(pixels).isfinite().all())
    vae.register_to_config(force_upcast=False)
    assert not bool(family.encode_images(pixels).isfinite().all()), "else the test shows nothing"


# --- attention


def formula(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """What xformers documents: [B, L, D] without heads, or [B, L, heads, D]."""
    scale = options.get("scale") or query.shape[-1] ** -0.5
    return torch.softmax(query @ key.transpose(-1, -2) * scale, dim=-1) @ value


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], list[int]]:
    """Puts a function where xformers would be, which runs on GPUs alone; gives the widths that it was called with."""

    def put(compute: Callable[..., Tensor]) -> list[int]:
        widths: list[int] = []

        def called(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, **options: Any) -> Tensor:
            assert attn_bias is None
            widths.append(query.shape[-1])
            return compute(query, key, value, **options)

        ops = SimpleNamespace(memory_efficient_attention=called)
        monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops), raising=False)
        return widths

    return put


def test_attention_by_xformers_is_used_everywhere_and_changes_nothing(
    tiny_sdxl: Path, stand_in: Callable[[Callable[..., Tensor]], list[int]]
) -> None:
    widths = stand_in(formula)
    plain, other = load(tiny_sdxl), load(tiny_sdxl, attention="xformers")
    tried = len(widths)
    assert tried == 1, "one trial for the one width of heads"
    xt = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cond, t = plain.encode(["a star"]), torch.tensor([500])
        expected = plain.predict(xt, t, cond)
        assert len(widths) == tried
        torch.testing.assert_close(other.predict(xt, t, cond), expected, rtol=1e-5, atol=1e-5)
    layers = [module for module in other.denoiser.modules() if isinstance(module, attention_processor.Attention)]
    assert len(widths) - tried == len(layers) > 5


@pytest.mark.parametrize(
    ("compute", "says"),
    [
        (lambda q, k, v, **_: q, "its result is off by"),
        (lambda *_, **__: (_ for _ in ()).throw(NotImplementedError("No operator found:\nmore")), "No operator found)"),
    ],
)
def test_attention_that_does_not_work_here_is_refused(
    tiny_sdxl: Path,
    stand_in: Callable[[Callable[..., Tensor]], list[int]],
    compute: Callable[..., Tensor],
    says: str,
) -> None:
    stand_in(compute)
    with pytest.raises(BaseModelError, match=r"cannot serve heads of width 16 in torch\.float32 on cpu") as caught:
        load(tiny_sdxl, attention="xformers")
    assert says in str(caught.value)
    assert "take sdpa" in str(caught.value)


def test_attention_that_is_not_installed_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xformers", "xformers.ops"):  # another test may have imported both
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BaseModelError, match="not installed or cannot be loaded here: take sdpa"):
        load(tiny_base, attention="xformers")
