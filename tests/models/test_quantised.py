"""Quantised weights: off by what 127 levels allow, a byte each, and whatever reads, trains, exports or merges them."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer import cli, generate, registry, run
from trainer.adapters import ADAPTERS
from trainer.adapters.lora import LoRA
from trainer.args import AdapterArgs, ModelArgs
from trainer.models import FAMILIES, sniff
from trainer.models.latent import LatentFamily
from trainer.models.packed import pack
from trainer.models.quantised import QuantisedLinear, quantise
from trainer.rundir import RunDir
from trainer.types import BaseModelError, Cond

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(dtype: torch.dtype, *, bias: bool = True) -> tuple[nn.Linear, QuantisedLinear, Tensor]:
    """A layer whose rows differ a thousandfold in size, one of them 0; it in 8 bits; an input."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 40, bias=bias)
    plain.weight.data.mul_(torch.logspace(-3, 0, 40)[:, None])
    plain.weight.data[3] = 0.0
    plain = plain.to(dtype).requires_grad_(False)
    rounded = copy.deepcopy(plain)
    assert quantise(rounded) == 1
    assert isinstance(rounded, QuantisedLinear)
    return plain, rounded, torch.randn(3, 5, 48).to(dtype)


def steps(weight: Tensor) -> Tensor:
    """[o, 1]: the largest of each row in 127 steps."""
    return weight.double().abs().amax(1, keepdim=True) / 127


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_is_off_by_more_than_half_a_step(dtype: torch.dtype) -> None:
    plain, rounded, _ = linear(dtype)
    off = (rounded.codes.double() * rounded.scale.double() - plain.weight.double()).abs()
    spare = 1.01 if dtype == torch.float16 else 1.0 + 2.0**-8  # of the scale, which is in the weight's dtype
    most = 0.5 * steps(plain.weight) * spare + (2.0**-18 if dtype == torch.float16 else 0.0)
    assert bool((off <= most).all())
    assert off.max() > 0.4 * steps(plain.weight).max(), "there is something to round"
    assert bool((rounded.weight[3] == 0).all())
    assert rounded.weight.dtype == dtype


def test_outputs_are_off_by_no_more_than_that_allows() -> None:
    """|sum e_i x_i| is at most half a step times the sum of |x_i|, whatever x is."""
    plain, rounded, x = linear(torch.float32)
    off = (rounded(x) - plain(x)).abs().double()
    most = 0.5 * steps(plain.weight)[:, 0] * x.double().abs().sum(-1, keepdim=True)
    assert bool((off <= most + 1e-6).all())
    assert bool((off > 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_rounded_weight(dtype: torch.dtype, bias: bool) -> None:
    plain, rounded, x = linear(dtype, bias=bias)
    plain.weight.data.copy_(rounded.weight)
    found: list[tuple[Tensor, Tensor]] = []
    for layer in (plain, rounded):
        given = x.detach().requires_grad_()
        out: Tensor = layer(given)
        along = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(dtype)
        found.append((out.detach(), torch.autograd.grad(out, given, along)[0]))
    for right, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, right)


def test_autocast_is_obeyed() -> None:
    plain, rounded, x = linear(torch.float32)
    plain.weight.data.copy_(rounded.weight)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rounded(x), plain(x), rtol=2**-6, atol=1e-3)
        assert rounded(x).dtype == torch.bfloat16


def test_a_weight_is_held_in_a_byte_and_nothing_is_kept_for_the_backward_pass() -> None:
    _, rounded, x = linear(torch.float32)
    held = sum(tensor.numel() * tensor.element_size() for tensor in rounded.state_dict().values())
    assert held == 40 * 48 + 40 * 4 + 40 * 4  # codes, scales, bias
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rounded(x.requires_grad_())
    own = {rounded.codes.data_ptr(), rounded.scale.data_ptr()}
    assert {tensor.data_ptr() for tensor in kept} <= own


def test_what_trains_is_not_rounded_and_what_is_rounded_is_not_packed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False), nn.Conv2d(4, 4, 3))
    assert quantise(model) == 1
    assert [type(layer) for layer in model] == [nn.Linear, QuantisedLinear, nn.Conv2d]
    pack(model, "on", CPU)
    assert type(model[1]) is QuantisedLinear
    assert ModelArgs.model_validate({}).packing == "auto"
    assert ModelArgs.model_validate({"quantise": "int8"}).packing == "off"


def test_another_weight_cannot_be_assigned() -> None:
    _, rounded, _ = linear(torch.float32)
    rounded.weight = rounded.weight  # as PEFT does
    with pytest.raises(ValueError, match="a quantised weight cannot be changed"):
        rounded.weight = rounded.weight + 1.0


def test_copies_and_states_are_the_same() -> None:
    _, rounded, x = linear(torch.bfloat16)
    other = copy.deepcopy(rounded)
    assert torch.equal(other(x), rounded(x))
    rounded.codes.data.zero_()
    assert bool(other(x).any())
    rounded.load_state_dict(other.state_dict())
    assert torch.equal(other(x), rounded(x))


# --- families


def load(folder: Path, **options: Any) -> LatentFamily:
    args = sniff.named(ModelArgs(base=str(folder), **options))
    return registry.load(FAMILIES, args.family, "family").load(args, CPU)


def held(family: LatentFamily) -> int:
    gc.collect()
    return sum(tensor.numel() * tensor.element_size() for tensor in family.denoiser.state_dict().values())


def asked(family: LatentFamily) -> tuple[Tensor, Tensor, Cond]:
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return noisy, torch.tensor([10, 900]), family.encode(["a star", "a circle"])


@pytest.mark.parametrize("base", ["tiny_base", "tiny_sd2", "tiny_sdxl"])
def test_a_family_holds_less_and_predicts_nearly_the_same(base: str, request: pytest.FixtureRequest) -> None:
    plain, family = (load(request.getfixturevalue(base)) for _ in range(2))
    before, mark = held(family), plain.fingerprint("denoiser")
    layers = [layer for layer in family.denoiser.modules() if type(layer) is nn.Linear]
    weights = sum(layer.weight.numel() for layer in layers)
    rows = sum(layer.weight.shape[0] for layer in layers)
    family.quantise()
    assert before - held(family) == 3 * weights - 4 * rows
    gone = {id(layer) for layer in family.denoiser.modules() if isinstance(layer, QuantisedLinear)}
    assert len(gone) == len(layers)
    assert family.fingerprint("denoiser") == mark
    with torch.no_grad():
        right, mine = plain.predict(*asked(plain)), family.predict(*asked(family))
    off = (mine - right).norm() / right.norm()
    assert 0 < off < 0.02
    with pytest.raises(BaseModelError, match=r"weights are rounded \(model\.quantise\)"):
        family.tensors()


def test_the_float_weights_are_let_go(tiny_base: Path) -> None:
    import weakref

    family = load(tiny_base)
    watched = [weakref.ref(p) for m in family.denoiser.modules() if type(m) is nn.Linear for p in [m.weight]]
    family.quantise()
    gc.collect()
    assert watched
    assert not [ref for ref in watched if ref() is not None]


KINDS = [kind for kind in ADAPTERS if kind != "full"]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_get_nearly_the_gradients_of_the_float_base(tiny_base: Path, kind: str) -> None:
    found: list[dict[str, Tensor]] = []
    for rounded in (False, True):
        family = load(tiny_base)
        if rounded:
            family.quantise()
        bare = family.predict(*asked(family)).detach()
        options: dict[str, Any] = {"block": 4} if kind == "oft" else {"rank": 2}
        adapter = registry.load(ADAPTERS, kind, "kind")(
            AdapterArgs.model_validate({"kind": kind, "targets": "attention+ff", **options}), 3
        )
        named = adapter.attach(family)
        generator = torch.Generator().manual_seed(4)
        for _, parameter in named:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        family.predict(*asked(family)).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        assert len(adapter.differences()) > 0
        with adapter.disabled(), torch.no_grad():
            assert torch.equal(family.predict(*asked(family)), bare)
        adapter.detach()
        with torch.no_grad():
            assert torch.equal(family.predict(*asked(family)), bare)
    right, mine = found
    assert right.keys() == mine.keys()
    together = [torch.cat([grads[name].flatten() for name in right]) for grads in found]
    assert (together[1] - together[0]).norm() / together[0].norm() < 0.05
    assert not torch.equal(*together)


def test_a_lora_keeps_no_float_weight_for_the_backward_pass(tiny_base: Path) -> None:
    family = load(tiny_base)
    family.quantise()
    floats = [layer.weight for layer in family.denoiser.modules() if isinstance(layer, QuantisedLinear)]
    LoRA(AdapterArgs.model_validate({"rank": 2}), 0).attach(family)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        family.predict(*asked(family)).square().sum().backward()
    shapes = {tuple(weight.shape) for weight in floats}
    flat = [t if tuple(t.shape) in shapes else t.t() for t in kept if t.ndim == 2 and t.is_floating_point()]
    assert kept
    assert not [t for t in flat for weight in floats if t.shape == weight.shape and torch.equal(t, weight)]


# --- runs


def tree(base: Path, pictures: Path, out: Path, name: str, **sections: Any) -> dict[str, Any]:
    return {
        "data": {"source": str(pictures)},
        "adapter": {"rank": 2},
        "sample": {"strengths": [], "steps": 1, "prompts": ["a red star"]},
        "hooks": {"tensorboard": False},
        "runtime": {"out": str(out), "name": name, "steps": 4, "batch_size": 2, "device": "cpu", "checkpoint_every": 2},
        **sections,
        "model": {"base": str(base), "quantise": "int8", "gradient_checkpointing": True, **sections.get("model", {})},
    }


def result(root: Path) -> dict[str, Tensor]:
    return load_file(root / "export" / f"{root.name}.safetensors")


def test_a_run_resumes_bit_exactly_exports_and_draws_on_the_float_base(
    tiny_sdxl: Path, tiny_pictures: Path, tmp_path: Path
) -> None:
    with run.opened(cli.validate(tree(tiny_sdxl, tiny_pictures, tmp_path, "whole"))) as session:
        denoiser = session.run.family.denoiser
        assert sum(isinstance(layer, QuantisedLinear) for layer in denoiser.modules()) > 20
        list(session.steps())
    with run.opened(cli.validate(tree(tiny_sdxl, tiny_pictures, tmp_path, "cut"))) as session:
        for step in session.steps():
            if step.step == 3:
                break
    cut = tmp_path / "cut"
    newest = RunDir.open(cut).newest_checkpoint()
    assert newest
    assert newest[0] == 2
    with run.resumed(cut) as session:
        list(session.steps())
    whole, again = result(tmp_path / "whole"), result(cut)
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert not [name for name in whole if "codes" in name or "scale" in name]

    weights = generate.find(tmp_path / "whole")
    painter = generate.Painter(generate.base_of([weights]), CPU)
    assert not [m for m in painter.family.denoiser.modules() if isinstance(m, QuantisedLinear)]
    painter.use([generate.Weighted(painter.read(weights))])
    assert painter.draw(["a red star"], [1], generate.Look(steps=1))

    saved = session.args
    changed = saved.model_copy(update={"model": saved.model.model_copy(update={"quantise": "none"})})
    with pytest.raises(run.RunError, match=r"cannot change model\.quantise \(was 'int8', now 'none'\);"):
        run.resumed(cut, changed).__enter__()


def test_what_is_merged_is_rounded_with_the_base(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    options = tree(tiny_base, tiny_pictures, tmp_path, "first", model={"quantise": "none"})
    options["optim"] = {"adapter": {"lr": 0.5}}
    with run.opened(cli.validate(options)) as session:
        list(session.steps())
    first = str(tmp_path / "first")
    weights: list[Tensor] = []
    for name, form in (("float", "none"), ("rounded", "int8")):
        options = tree(tiny_base, tiny_pictures, tmp_path, name, model={"quantise": form, "merge": {first: 1.0}})
        with run.opened(cli.validate(options)) as session:
            layer = session.run.family.denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
            layer = getattr(layer, "base_layer", layer)
            assert isinstance(layer, nn.Linear)
            weights.append(layer.weight.detach().clone())
    whole, rounded = weights
    assert bool(((whole - rounded).abs() <= 0.5001 * steps(whole)).all())


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"model": {"packed": "on"}},
            r"packed is on, which holds two more copies.*quantise is int8.*take packed auto or off, or quantise none",
        ),
        (
            {"adapter": {"kind": "full"}},
            r"adapter\.kind is full.*model\.quantise is int8.*take another kind, adapter\.targets norm, or",
        ),
        (
            {"export": {"layouts": ["kohya", "checkpoint"]}},
            r"export\.layouts has checkpoint, but model\.quantise is int8.*or take quantise none",
        ),
        ({"model": {"quantise": "int4"}}, r"model\.quantise.*'none' or 'int8'"),
    ],
)
def test_what_needs_whole_weights_is_refused(sections: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        cli.validate(tree(tmp_path, tmp_path, tmp_path, "x", **sections))


def test_norms_are_trained_whole_beside_it(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    options = tree(tiny_base, tiny_pictures, tmp_path, "norms", adapter={"kind": "full", "targets": "norm"})
    with run.opened(cli.validate(options)) as session:
        list(session.steps())
