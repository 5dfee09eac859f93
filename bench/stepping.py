"""What a training step costs, in one process: the trainer's loop, its bare denoiser, and the plain script, in turns.

`main` prints the figures of the `Case` that the command line gives as JSON. bench.speed starts a process for each, so
that each has its own memory.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bench import measuring
from bench.measuring import Figures
from trainer import export, sampler
from trainer.args import TrainArgs
from trainer.console import hush_libraries
from trainer.loop import Run, train
from trainer.models.packed import PackedConv2d, PackedLinear, pack
from trainer.run import Session, opened

ROOT = Path(__file__).resolve().parent.parent
BASES = {"sd15": "testbed/base", "sdxl": "testbed/base-sdxl"}
FULL = {"sd15": "bench.fullsize:SD15", "sdxl": "bench.fullsize:SDXL"}
CAPTION = "a red TOK on a white background"


@dataclass(frozen=True)
class Case:
    """One training situation, and what is measured of it."""

    family: str = "sd15"
    size: str = "tiny"  # the shipped base, or "full": the published sizes with random weights
    resolution: int = 64  # pixels
    batch: int = 4
    rank: int = 8
    dtype: str = "fp32"
    rounds: int = 5
    what: str = "steps"  # or "memory", "work", "pictures", "length", "gradients"
    pictures: int = 4
    model: str = "{}"  # further options of the section model, as JSON
    device: str = "cpu"  # or "cuda"


def main() -> None:
    hush_libraries()
    case = Case(**json.loads(sys.argv[1]))
    kinds: dict[str, Callable[[Case], Figures]] = {
        "steps": steps,
        "memory": memory,
        "work": work,
        "pictures": data,
        "length": length,
        "gradients": gradients,
    }
    print(json.dumps({**asdict(case), **kinds[case.what](case)}))


def steps(case: Case) -> Figures:
    """Seconds a step of each way, in turns; FLOP of a step and the best rates of the machine meanwhile."""
    with _session(case) as session:
        run = session.run
        ways: dict[str, Callable[[], object]] = {"trainer": trainer(run), "bare": bare(run)}
        if case.family == "sd15" and case.device == "cpu":
            scripts = [_plain(session, case, cached=cached) for cached in (True, False)]
            latents, hidden = (tensor.repeat(case.batch, *[1] * (tensor.ndim - 1)) for tensor in scripts[0].cache[0])
            ways |= {
                "plain, bare": lambda: _forgetting(scripts[0], latents, hidden),
                "plain, cached": scripts[0].step,
                "plain": scripts[1].step,
            }
        denoiser: Any = run.family.denoiser
        rates = [measuring.rates(denoiser.dtype, device=case.device)]
        found = measuring.interleaved(ways, case.rounds, device=case.device)
        rates.append(measuring.rates(denoiser.dtype, device=case.device))
        best = {name: max(rate[name] for rate in rates) for name in rates[0]}
        with torch.compiler.set_stance("force_eager"):  # what is compiled is not counted
            work = flop(ways.get("plain, bare", ways["bare"]))  # nor are packed operators
        bound = work / 1e9 / max(best.values())
        return {
            "ways": found,
            "images_per_s": {name: round(case.batch / measuring.seconds(of), 3) for name, of in found.items()},
            "gflop": round(work / 1e9, 2),
            "gflop_per_s": best,
            "bound_s": float(f"{bound:.4g}"),
            "peak_mib": measuring.Memory(case.device).peak(),
            "packed": sum(isinstance(m, PackedLinear | PackedConv2d) for m in run.family.denoiser.modules()),
        }


def trainer(run: Run) -> Callable[[], object]:
    """Update after update of the trainer's own loop, without hooks."""
    going = train(replace(run, hooks=[], steps=10**6))
    return lambda: next(going)


def bare(run: Run) -> Callable[[], object]:
    """The denoiser forward and backward on the first batch's tensors, with the run's adapters, and nothing else."""
    samples, device = run.dataset.micro(0), run.engine.device
    with torch.no_grad():
        cond = replace(run.encode(samples.captions), sizes=samples.sizes)
    generator = torch.Generator().manual_seed(0)
    latents = samples.latents.to(device)
    eps = torch.randn(latents.shape, generator=generator).to(device)
    t = torch.randint(0, 1000, (len(eps),), generator=generator).to(device)
    trained = [parameter for named in run.components.values() for _, parameter in named]

    def once() -> None:
        with run.engine.autocast():
            loss = F.mse_loss(run.family.predict(latents, t, cond), eps)
        run.engine.backward(loss)
        for parameter in trained:
            parameter.grad = None

    return once


def flop(once: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        once()
    return counter.get_total_flops()


def memory(case: Case) -> Figures:
    """What training holds: the peak until the first step and over the steps, weights, and a bare step's own share.

    The last is the peak of the bare step less what is there when it is over, without freed memory that the C library
    keeps. Of a GPU it is what torch has of its memory.
    """
    meter = measuring.Memory(case.device)
    with _session(case) as session:
        prepared = meter.peak()
        meter.forget()
        found = measuring.interleaved({"trainer": trainer(session.run)}, case.rounds, device=case.device)
        peak = meter.peak()
        once, family = bare(session.run), session.run.family
        once()
        meter.forget()
        before = meter.now()
        once()
        weights = {
            "denoiser": _mib(family.denoiser),
            "vae": _mib(family.vae),
            "text": sum(_mib(tower) for tower in family.text_encoders.values()),
        }
        return {
            "ways": found,
            "prepared_mib": prepared,
            "peak_mib": max(prepared, peak),
            "weights_mib": weights,
            "activations_mib": meter.peak() - before,
        }


def gradients(case: Case) -> Figures:
    """How far a LoRA's gradients are from those in double precision, with the base's weights plain and packed.

    Errors are those of a tensor's norm, by tensor; both matrices of every LoRA are random, so that each has a gradient.
    """
    with _session(replace(case, model=json.dumps({**json.loads(case.model), "packed": "off"}))) as session:
        run, unet = session.run, session.run.family.denoiser
        generator = torch.Generator().manual_seed(1)
        named = [pair for each in run.components.values() for pair in each]
        with torch.no_grad():
            for _, parameter in named:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        samples = run.dataset.micro(0)
        with torch.no_grad():
            cond = run.encode(samples.captions)
        eps = torch.randn(samples.latents.shape, generator=generator)
        t = torch.full((len(eps),), 500)

        def taken(dtype: torch.dtype) -> dict[str, torch.Tensor]:
            with run.engine.autocast() if dtype != torch.float64 else nullcontext():
                pred = run.family.predict(samples.latents.to(dtype), t, replace(cond, hidden=cond.hidden.to(dtype)))
                F.mse_loss(pred, eps.to(dtype)).backward()
            found = {name: parameter.grad.double() for name, parameter in named if parameter.grad is not None}
            for _, parameter in named:
                parameter.grad = None
            return found

        plain = taken(torch.float32)
        own = next(unet.parameters()).dtype
        unet.double()
        exact = taken(torch.float64)
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else own)
        count = pack(unet, "on", torch.device("cpu"))
        packed = taken(torch.float32)
        return {
            "layers_packed": count,
            "tensors": len(exact),
            "plain": _errors(plain, exact),
            "packed": _errors(packed, exact),
            "packed to plain": _errors(packed, plain),
        }


def _errors(found: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> Figures:
    """Of norms: the median over the tensors, the worst, and whose that is."""
    errors = {name: float((found[name] - own).norm() / own.norm()) for name, own in right.items()}
    worst = max(errors, key=lambda name: errors[name])
    middle = statistics.median(errors.values())
    return {"median": float(f"{middle:.3g}"), "worst": float(f"{errors[worst]:.3g}"), "of": worst}


def work(case: Case) -> Figures:
    """The data path alone, sampling, a checkpoint, an export."""
    with _session(case) as session:
        run = session.run
        micros = iter(range(10**9))
        prompts = [CAPTION] * 4
        going = trainer(run)
        going()

        def batches() -> None:
            for _ in range(50):
                run.encode(run.dataset.micro(next(micros)).captions)

        def drawn() -> None:
            sampler.generate(run.family, prompts, seeds=range(4), steps=25, guidance=3.0)

        def exported() -> None:
            export.export(session.dir.export, "x", run.family, run.adapters, session.args)

        numbers = iter(range(1, 10**6))
        ways = {
            "data": batches,
            "sampling": drawn,
            "checkpoint": lambda: session.checkpoint(next(numbers)),
            "export": exported,
        }
        found = measuring.interleaved(ways, case.rounds)
        return {
            "ways": found,
            "data_pictures_per_s": round(50 * case.batch / found["data"]["cpu_s"]),
            "sampling_pictures_per_s": round(4 / found["sampling"]["cpu_s"], 2),
            "sampling_steps": 25,
        }


def data(case: Case) -> Figures:
    """From pictures to the first batch: what preparing them costs, and what a step then costs and holds."""
    began = time.process_time()
    with _session(case) as session:
        prepared = time.process_time() - began
        found = measuring.interleaved({"trainer": trainer(session.run)}, case.rounds, warm=2)
        return {"prepared_cpu_s": round(prepared, 2), "ways": found, "peak_mib": measuring.Memory().peak()}


def length(case: Case) -> Figures:
    """The first and the last tenth of a long run: time of a step, and memory."""
    with _session(case) as session:
        going = trainer(session.run)
        tenth = max(1, case.rounds // 10)
        first = measuring.interleaved({"first": going}, tenth, warm=5)["first"]
        at_first = measuring.Memory().now()
        for _ in range(case.rounds - 2 * tenth):
            going()
        last = measuring.interleaved({"last": going}, tenth, warm=0)["last"]
        return {"ways": {"first": first, "last": last}, "mib": [at_first, measuring.Memory().now()]}


def draw(folder: Path, count: int, side: int) -> Path:
    """PNGs of smooth noise with captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        small = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.png")
        (folder / f"{number:06d}.txt").write_text(CAPTION, encoding="utf-8")
    return folder


@contextmanager
def _session(case: Case) -> Generator[Session]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        folder = draw(Path(out) / "pictures", case.pictures, case.resolution)
        model = {"base": BASES[case.family], "dtype": case.dtype, **json.loads(case.model)}
        if case.size == "full" and model["base"] == BASES[case.family]:  # another one is that of `fullsize.written`
            model["family"] = FULL[case.family]
        args = TrainArgs.model_validate(
            {
                "data": {
                    "source": str(folder),
                    "resolution": case.resolution,
                    "limits": {"entries": 2 * case.pictures + 1},
                },
                "model": model,
                "adapter": {"rank": case.rank, "targets": "attention"},  # as the plain script
                "sample": {"steps": 1},
                "hooks": {"tensorboard": False},
                "runtime": {"out": out, "threads": 1, "batch_size": case.batch, "device": case.device, "steps": 10**6},
            }
        )
        with opened(args) as session:
            yield session


def _plain(session: Session, case: Case, *, cached: bool) -> Any:
    """The plain script around the same frozen weights, which are not held twice."""
    from bench import plain  # which imports more than a run does

    family: Any = session.run.family
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(family.denoiser.config)
    own = {name.replace(".base_layer.", "."): tensor for name, tensor in family.denoiser.state_dict().items()}
    unet.load_state_dict({name: own[name] for name in unet.state_dict()}, assign=True)
    unet.eval().requires_grad_(False)
    return plain.Plain(
        unet,
        family.vae,
        family.text_encoders["text_encoder"],
        family.tokenizers["text_encoder"],
        plain.DDPMScheduler.from_config(family.pipeline().scheduler.config),
        plain.pictures(session.dir.root.parent / "pictures"),
        resolution=case.resolution,
        batch=case.batch,
        rank=case.rank,
        cached=cached,
    )


def _forgetting(script: Any, latents: torch.Tensor, hidden: torch.Tensor) -> None:
    script.backward(latents, hidden)
    script.optimizer.zero_grad()


def _mib(module: torch.nn.Module) -> int:
    """Of its frozen tensors."""
    frozen = [*(p for p in module.parameters() if not p.requires_grad), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in frozen) // 2**20
