"""How speed is measured and told: turns, medians, targets; a base of full size that is a family like any other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from bench import fullsize, measuring, plain, speed_tables, stepping
from trainer.args import ModelArgs
from trainer.models.sd15 import SD15

ROOT = Path(__file__).parents[1]


def test_ways_take_turns_and_the_first_round_only_warms_up() -> None:
    calls: list[str] = []
    ways = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = measuring.interleaved(ways, rounds=3)
    assert calls == ["a", "b"] * 4
    assert {name: figures["rounds"] for name, figures in found.items()} == {"a": 3, "b": 3}


def test_a_spread_is_of_median_and_quartiles() -> None:
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert measuring.spread(values) == {"cpu_s": 3.0, "quartiles": [2.0, 4.0], "rounds": 5, "each": values}
    assert measuring.spread([7.0]) == {"cpu_s": 7.0, "quartiles": [7.0, 7.0], "rounds": 1, "each": [7.0]}
    assert measuring.spread([7.0], "cuda")["gpu_s"] == 7.0


def test_a_ratio_is_that_of_rounds_so_that_a_slow_one_slows_both() -> None:
    figures = {"one": measuring.spread([1.0, 5.0, 1.1]), "other": measuring.spread([2.0, 10.0, 2.2])}
    assert measuring.ratio(figures, "one", "other") == 0.5
    figures["other"] = measuring.spread([2.0, 2.1, 2.2])
    assert measuring.ratio(figures, "one", "other") == 0.5
    assert measuring.ratio(figures, "other", "one") == 2.0
    older = {name: {"cpu_s": seconds} for name, seconds in (("one", 1.0), ("other", 4.0))}
    assert measuring.ratio(older, "one", "other") == 0.25


def results(trainer: float) -> dict[str, Any]:
    ways = {"trainer": trainer, "bare": 1.0, "plain, bare": 2.0, "plain": 4.0, "plain, cached": 2.1}
    case = {"dtype": "bf16", "ways": {name: measuring.spread([value]) for name, value in ways.items()}}
    return {"full": {"cases": [case]}}


def test_targets_are_reached_or_missed() -> None:
    good, bad = (speed_tables.targets(results(trainer)) for trainer in (1.02, 1.9))
    assert "| 1.03 | 1.020 | reached |" in good
    assert "| 0.65 | 0.510 | reached |" in good
    assert "| 0.45 | 0.255 | reached |" in good
    assert "| 0.65 | 0.950 | missed |" in bad
    assert "| 0.45 | 0.475 | missed |" in bad
    assert good.count(speed_tables.NOT_YET) == 3


def test_a_gpus_targets_are_shares_of_its_own_peak_and_its_memory() -> None:
    def way(bound: float, seconds: float) -> dict[str, Any]:
        return {"bound_s": bound, "ways": {"trainer": measuring.spread([seconds], "cuda")}}

    found = {"plain": way(0.4, 1.0), "compiled": way(0.6, 1.0), "least": {"peak_mib": 7000}}
    shown = speed_tables.targets({"gpu": found})
    assert "| >= 50 % | 40% | missed |" in shown
    assert "compiled blocks | >= 50 % | 60% | reached |" in shown
    assert "| 8 GB | 7.3 GB | reached |" in shown
    assert speed_tables.NOT_YET not in shown
    assert "| 8 GB | 8.4 GB | missed |" in speed_tables.targets({"gpu": found | {"least": {"peak_mib": 8000}}})


def test_errors_are_of_norms_and_the_worst_is_named() -> None:
    right = {name: torch.tensor([3.0, 4.0]) for name in ("a", "b", "c")}
    found = {"a": torch.tensor([3.0, 4.5]), "b": right["b"].clone(), "c": torch.tensor([3.0, 4.0 - 0.01])}
    assert stepping._errors(found, right) == {"median": 0.002, "worst": 0.1, "of": "a"}


def test_memory_is_that_of_this_process_and_of_the_bases_weights() -> None:
    found = stepping.memory(stepping.Case(what="memory", rounds=1, pictures=2))
    unet = ROOT / "testbed/base/unet/diffusion_pytorch_model.safetensors"
    assert found["weights_mib"]["denoiser"] == 2 * unet.stat().st_size // 2**20  # it is kept in fp16
    assert found["peak_mib"] >= found["prepared_mib"] > 100
    assert 1 < found["activations_mib"] < 200
    meter = measuring.Memory()
    meter.forget()
    before = meter.peak()
    held = torch.ones(64 * 2**18)  # 64 MiB
    assert meter.now() > before + 50
    del held
    meter.forget()
    assert meter.peak() < before + 50


def test_packed_gradients_are_compared_with_double_precision() -> None:
    found = stepping.gradients(stepping.Case(batch=1, what="gradients"))
    assert found["layers_packed"] > 100
    for way in ("plain", "packed"):
        assert 0 < found[way]["median"] < 1e-4
        assert found[way]["worst"] < 1e-2
    assert found["packed to plain"]["median"] > 0  # another way of computing


def test_a_base_of_random_weights_is_written_as_one_that_loads_the_same(tiny_base: Path, tmp_path: Path) -> None:
    class Small:
        @staticmethod
        def load(args: Any, device: torch.device) -> SD15:
            return SD15.load(args.model_copy(update={"base": str(tiny_base)}), device)

    fullsize.written(Small, "bf16", tmp_path / "base")  # pyright: ignore[reportArgumentType]
    there, own = (
        SD15.load(ModelArgs.model_validate({"base": str(base), "dtype": "bf16"}), torch.device("cpu"))
        for base in (tmp_path / "base", tiny_base)
    )
    for part, tensors in own.tensors().items():
        assert all(torch.equal(tensor, there.tensors()[part][name]) for name, tensor in tensors.items())
    assert torch.equal(there.encode(["a red star"]).hidden, own.encode(["a red star"]).hidden)


def test_every_measured_target_of_the_page_has_its_figure() -> None:
    shown = speed_tables.targets(json.loads((ROOT / "bench/results/speed.json").read_text(encoding="utf-8")))
    assert shown.count(speed_tables.NOT_YET) == 3  # those that need a GPU
    assert "| 3.5 |" in shown


def test_a_random_part_has_weights_of_usual_size() -> None:
    with torch.device("meta"):
        part = nn.Sequential(nn.Linear(64, 256), nn.Conv2d(16, 32, 3), nn.LayerNorm(8))
    fullsize.fill(part, torch.bfloat16, torch.device("cpu"))
    linear, conv, norm = part[0], part[1], part[2]
    assert isinstance(linear, nn.Linear)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.LayerNorm)
    assert linear.weight.dtype == torch.bfloat16
    assert linear.weight.float().std().item() == pytest.approx(1 / 8, rel=0.05)
    assert conv.weight.float().std().item() == pytest.approx(1 / math.sqrt(16 * 9), rel=0.05)
    assert not linear.bias.any()
    assert bool((norm.weight == 1).all())


def test_a_random_part_with_an_unknown_buffer_is_refused() -> None:
    with torch.device("meta"):
        part = nn.BatchNorm2d(2)
    with pytest.raises(ValueError, match="running_mean"):
        fullsize.fill(part, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("cached", [True, False])
def test_the_plain_script_trains_attention(tiny_base: Path, tiny_pictures: Path, cached: bool) -> None:
    family: Any = SD15.load(ModelArgs.model_validate({"base": str(tiny_base)}), torch.device("cpu"))
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet").requires_grad_(False)
    script = plain.Plain(
        unet, family.vae, family.text_encoders["text_encoder"], family.tokenizers["text_encoder"],
        DDPMScheduler.from_pretrained(tiny_base, subfolder="scheduler"), plain.pictures(tiny_pictures),
        resolution=32, batch=2, rank=4, cached=cached,
    )  # fmt: skip
    losses = [script.step() for _ in range(4)]
    assert all(map(math.isfinite, losses))
    assert len(script.trained) == 2 * len(plain.TARGETS) * sum(
        1 for name, _ in unet.named_modules() if name.endswith(("attn1", "attn2"))
    )
    moved = [parameter for name, parameter in unet.named_parameters() if "lora_B" in name and bool(parameter.any())]
    assert len(moved) == len(script.trained) / 2
