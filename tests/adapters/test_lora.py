"""LoRA against PEFT's own arithmetic, and what it must leave alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from trainer.adapters.lora import LoRA
from trainer.args import AdapterArgs, ModelArgs
from trainer.models.sd15 import SD15
from trainer.types import Cond

CPU = torch.device("cpu")


@pytest.fixture
def family(tiny_base: Path) -> SD15:
    return SD15.load(ModelArgs(base=str(tiny_base)), CPU)


def predict(family: SD15) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    xt, hidden = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 32, 32, generator=generator)
    return family.predict(xt, torch.tensor([10, 900]), Cond(hidden))


def fill(parameters: list[tuple[str, nn.Parameter]], seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_attach_changes_nothing_and_detach_restores(family: SD15) -> None:
    before, names = predict(family), [name for name, _ in family.denoiser.named_modules()]
    attributes = set(vars(family.denoiser))
    lora = LoRA(AdapterArgs(targets="attention+ff+conv"), seed=0)
    parameters = lora.attach(family)
    assert torch.equal(predict(family), before)
    fill(parameters)
    assert not torch.allclose(predict(family), before)
    lora.detach()
    assert torch.equal(predict(family), before)
    assert [name for name, _ in family.denoiser.named_modules()] == names
    assert set(vars(family.denoiser)) == attributes


def test_attach_trains_float32_updates_and_nothing_else(tiny_base: Path) -> None:
    half = SD15.load(ModelArgs(base=str(tiny_base), dtype="bf16"), CPU)
    parameters = LoRA(AdapterArgs(), seed=0).attach(half)
    assert {p.dtype for _, p in parameters} == {torch.float32}
    trainable = {id(p) for p in half.denoiser.parameters() if p.requires_grad}
    assert trainable == {id(p) for _, p in parameters}
    predict(half).sum().backward()
    assert all(p.grad is not None for _, p in parameters)


@pytest.mark.parametrize(
    ("targets", "tails"),
    [
        ("attention", {"to_q", "to_k", "to_v", "0"}),
        ("attention+ff", {"to_q", "to_k", "to_v", "0", "proj", "2"}),
        (
            "attention+ff+conv",
            {
                "to_q",
                "to_k",
                "to_v",
                "0",
                "proj",
                "2",
                "conv1",
                "conv2",
                "conv_shortcut",
                "conv",
                "proj_in",
                "proj_out",
            },
        ),
    ],
)
def test_targets(family: SD15, targets: str, tails: set[str]) -> None:
    lora = LoRA(AdapterArgs(targets=targets), seed=0)
    lora.attach(family)
    paths = [path for _, path in lora.modules()]
    assert {path.rsplit(".", 1)[1] for path in paths} == tails
    attention = [path for path in paths if ".attn" in path]
    assert len(attention) == 4 * 8  # 4 transformer blocks, attn1 and attn2, 4 projections each


def test_targets_that_the_denoiser_lacks_are_refused(family: SD15) -> None:
    family.denoiser = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no attention layers"):
        LoRA(AdapterArgs(), seed=0).attach(family)


def test_update_is_alpha_over_rank_up_down(family: SD15) -> None:
    before = {name: p.clone() for name, p in family.denoiser.named_parameters()}
    lora = LoRA(AdapterArgs(rank=4, alpha=2.0, targets="attention+ff+conv"), seed=0)
    fill(lora.attach(family))
    live, modules = predict(family), lora.modules()
    lora.detach()
    with torch.no_grad():
        for (_, path), m in modules.items():
            weight = family.denoiser.get_parameter(f"{path}.weight")
            delta = torch.einsum("or,ri->oi", m.up.flatten(1), m.down.flatten(1)).reshape(weight.shape)
            weight.copy_(before[f"{path}.weight"] + m.alpha / 4 * delta)
    assert {m.alpha for m in modules.values()} == {2.0}
    torch.testing.assert_close(predict(family), live, rtol=1e-4, atol=1e-4)


def test_alpha_defaults_to_the_rank() -> None:
    assert LoRA(AdapterArgs(rank=6), seed=0).alpha == 6.0


def test_disabled_is_the_base_and_comes_back(family: SD15) -> None:
    base = predict(family)
    lora = LoRA(AdapterArgs(), seed=0)
    parameters = lora.attach(family)
    fill(parameters)
    on = predict(family)
    with lora.disabled():
        assert torch.equal(predict(family), base)
        with lora.disabled():
            assert torch.equal(predict(family), base)
        assert torch.equal(predict(family), base)
    assert torch.equal(predict(family), on)
    assert all(p.requires_grad for _, p in parameters)


def test_disabled_keeps_gradients_of_a_graph_made_before(family: SD15) -> None:
    lora = LoRA(AdapterArgs(), seed=0)
    parameters = lora.attach(family)
    fill(parameters)
    on = predict(family)
    with lora.disabled():
        target = predict(family)
    (on - target).square().mean().backward()
    assert all(p.grad is not None for _, p in parameters)


def test_scaled_multiplies_the_update(family: SD15) -> None:
    base = predict(family)
    lora = LoRA(AdapterArgs(rank=4, alpha=2.0), seed=0)
    fill(lora.attach(family))
    on = predict(family)
    with lora.scaled(0.0):
        assert torch.equal(predict(family), base)
    with lora.scaled(0.5):
        half = predict(family)
        with lora.scaled(2.0):
            torch.testing.assert_close(predict(family), on)
    assert torch.equal(predict(family), on)
    for parameter in lora.state_dict():
        if parameter.endswith("lora_B.weight"):
            lora.state_dict()[parameter].mul_(0.5)
    torch.testing.assert_close(predict(family), half)


def test_state_goes_to_another_instance(family: SD15, tiny_base: Path) -> None:
    lora = LoRA(AdapterArgs(dropout=0.1), seed=0)
    parameters = lora.attach(family)
    fill(parameters)
    assert list(lora.state_dict()) == [name for name, _ in parameters]
    saved = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    other = LoRA(AdapterArgs(dropout=0.1), seed=1)
    other.attach(SD15.load(ModelArgs(base=str(tiny_base)), CPU))
    other.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in other.state_dict().items())


def test_state_that_does_not_fit_is_refused(family: SD15) -> None:
    lora = LoRA(AdapterArgs(), seed=0)
    lora.attach(family)
    state = lora.state_dict()
    first = min(state)
    with pytest.raises(ValueError, match="1 missing"):
        lora.load_state_dict({k: v for k, v in state.items() if k != first})
    with pytest.raises(ValueError, match="1 unknown"):
        lora.load_state_dict({**state, "other": torch.zeros(1)})
    with pytest.raises(ValueError, match="has shape"):
        lora.load_state_dict({**state, first: torch.zeros(1)})


@pytest.fixture
def rng_is_untouched() -> Iterator[None]:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("rng_is_untouched")
def test_start_is_a_function_of_the_seed(family: SD15) -> None:
    def start(seed: int) -> Tensor:
        lora = LoRA(AdapterArgs(), seed=seed)
        lora.attach(family)
        state = {k: v.clone() for k, v in lora.state_dict().items()}
        lora.detach()
        assert all(not v.any() for k, v in state.items() if "lora_B" in k)
        a = next(v for k, v in state.items() if "lora_A" in k)
        assert a.abs().max() <= 1 / math.sqrt(a.shape[1])  # kaiming-uniform with a = sqrt(5)
        return a

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_dropout_acts_while_training_and_not_in_eval(family: SD15) -> None:
    lora = LoRA(AdapterArgs(dropout=0.5), seed=0)
    fill(lora.attach(family))
    assert not torch.equal(predict(family), predict(family))
    family.denoiser.eval()
    assert torch.equal(predict(family), predict(family))


def test_attaching_twice_is_refused(family: SD15) -> None:
    lora = LoRA(AdapterArgs(), seed=0)
    lora.attach(family)
    with pytest.raises(RuntimeError, match="attached already"):
        lora.attach(family)


def test_start_and_order_are_pefts_own(family: SD15) -> None:
    lora = LoRA(AdapterArgs(rank=4, targets="attention+ff+conv"), seed=3)
    mine = {name: p.detach().clone() for name, p in lora.attach(family)}
    paths = [path for _, path in lora.modules()]
    lora.detach()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LoraModel(family.denoiser, LoraConfig(r=4, lora_alpha=4, target_modules=paths), "default")
    theirs = {n.replace(".default", ""): p for n, p in family.denoiser.named_parameters() if "lora_" in n}
    assert list(mine) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    model.unload()
