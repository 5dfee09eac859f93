"""Parts that no update needs: where they are in between, and that nothing of them is lost."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trainer import sampler
from trainer.args import ModelArgs, TrainArgs
from trainer.models import resting
from trainer.models.quantised import quantise
from trainer.models.resting import Resting, give_back
from trainer.models.sd15 import SD15
from trainer.run import opened

CPU = torch.device("cpu")


class Part(nn.Module):
    """A module that is said to be on a device, and remembers where it was sent."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.sent = torch.device(device), []

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return iter([SimpleNamespace(device=self.device)])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def move(part: Any, device: torch.device) -> None:
        part.sent.append(str(device))
        part.device = device

    monkeypatch.setattr(resting, "_move", move)
    return {name: Part("cuda:1") for name in ("vae", "text_encoder", "denoiser")}


def test_what_rests_is_in_ram_and_comes_back_when_it_is_used(parts: dict[str, Any]) -> None:
    rests = Resting(parts)
    rests.rest(["vae", "text_encoder"])
    assert [str(part.device) for part in parts.values()] == ["cpu", "cpu", "cuda:1"]
    with rests.awake("vae", "denoiser"):
        assert [str(part.device) for part in parts.values()] == ["cuda:1", "cpu", "cuda:1"]
        with rests.awake():
            assert {str(part.device) for part in parts.values()} == {"cuda:1"}
        assert [str(part.device) for part in parts.values()] == ["cuda:1", "cpu", "cuda:1"]
    assert [str(part.device) for part in parts.values()] == ["cpu", "cpu", "cuda:1"]
    rests.rest(["vae"])
    assert [str(part.device) for part in parts.values()] == ["cpu", "cuda:1", "cuda:1"]
    assert parts["vae"].sent == ["cpu", "cuda:1", "cpu"]
    assert parts["denoiser"].sent == []


def test_an_error_lays_them_down_again(parts: dict[str, Any]) -> None:
    rests = Resting(parts)
    rests.rest(["vae"])
    with pytest.raises(KeyError), rests.awake():
        raise KeyError
    assert str(parts["vae"].device) == "cpu"


def resident(file: Path) -> int:
    """KiB of a mapped file that are in this process's memory."""
    shown = Path("/proc/self/smaps").read_text(encoding="utf-8")
    return sum(int(kib) for kib in re.findall(rf"{re.escape(str(file))}\n(?:\w+: .*\n)*?Rss: +(\d+) kB", shown))


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache is told of through madvise")
def test_on_a_cpu_pages_go_back_to_their_file_and_changes_stay(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"w": torch.arange(8 * 2**20, dtype=torch.float32)}, file)
    part = nn.Module()
    part.w = nn.Parameter(load_file(file)["w"], requires_grad=False)
    part.w[5000:5100] = -1.0  # pages of its own, which no file has
    expected = part.w.sum()
    before = resident(file)
    assert before > 30 * 2**10
    rests = Resting({"part": part})
    rests.rest(["part"])
    assert resident(file) < before / 10
    assert torch.equal(part.w.sum(), expected)
    assert part.w[5099] == -1.0


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache is told of through madvise")
def test_rounding_lets_go_of_the_layers_that_it_leaves_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"w": torch.arange(9 * 2**19, dtype=torch.float32).reshape(512, 1024, 3, 3)}, file)
    conv, linear = nn.Conv2d(1024, 512, 3), nn.Linear(4, 4)
    conv.weight = nn.Parameter(load_file(file)["w"])
    root = nn.Sequential(conv, linear).requires_grad_(False)
    expected = conv.weight.sum()  # as a fingerprint reads it
    before = resident(file)
    assert before > 15 * 2**10
    quantise(root)
    assert resident(file) < before / 10
    assert torch.equal(conv.weight.sum(), expected)


def test_advice_is_given_about_ram_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, ...]] = []
    monkeypatch.setattr(resting, "_of_libc", lambda *_: lambda *what: given.append(what))
    here = torch.zeros(2**20)
    give_back([torch.zeros(2**20, device="meta"), here])
    ((start, size, _),) = given
    assert here.data_ptr() <= start < start + size <= here.data_ptr() + here.nbytes


def test_encoding_in_float32_leaves_the_vae_its_own_memory(tiny_base: Path) -> None:
    family = SD15.load(ModelArgs.model_validate({"base": str(tiny_base), "dtype": "bf16"}), CPU)
    assert family._vae.config.force_upcast
    own = [parameter.data_ptr() for parameter in family.vae.parameters()]
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    first = family.encode_images(pixels)
    assert [parameter.data_ptr() for parameter in family.vae.parameters()] == own
    assert {parameter.dtype for parameter in family.vae.parameters()} == {torch.bfloat16}
    assert torch.equal(family.encode_images(pixels), first)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["vae", "text_encoder"]),
        ({"text": {"tokens": 1}}, ["vae"]),
        ({"data": {"shuffle_tags": True, "caption_variants": 0}}, ["vae"]),
        ({"data": {"shuffle_tags": True, "caption_variants": 9}, "runtime": {"steps": 1, "batch_size": 1}}, ["vae"]),
        ({"data": {"class_words": ["star"]}, "objective": {"prior_weight": 1}}, ["vae", "text_encoder"]),
        ({"adapter": {"text": {"train": True}}, "objective": {"mask_prior": 0}}, ["vae"]),
    ],
    ids=["cached text", "token rows", "shuffled captions", "more variants than are shown", "prior", "text trained"],
)
def test_a_run_lays_down_what_its_updates_do_not_use(
    given: dict[str, Any],
    expected: list[str],
    tiny_base: Path,
    tiny_pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    laid: list[nn.Module] = []
    monkeypatch.setattr(resting, "_give_back", laid.append)
    args = TrainArgs.model_validate(
        {
            "model": {"base": str(tiny_base)},
            "sample": {"steps": 1},
            "hooks": {"tensorboard": False},
            **given,
            "runtime": {"out": str(tmp_path), "steps": 2, "batch_size": 2, "device": "cpu", **given.get("runtime", {})},
            "data": {"source": str(tiny_pictures), "resolution": 32, **given.get("data", {})},
        }
    )
    with opened(args) as session:
        family: Any = session.run.family
        named = {id(module): name for name, module in {"vae": family.vae, **family.text_encoders}.items()}
        assert [named[id(part)] for part in laid] == expected
        assert len(list(session.steps())) == args.runtime.steps
        laid.clear()
        sampler.generate(family, ["a red star"], seeds=[0], steps=1, guidance=1.0)
        assert sorted(named[id(part)] for part in laid) == sorted(expected)
        laid.clear()
    with family.awake():
        pass
    assert laid == []  # nothing rests any more
