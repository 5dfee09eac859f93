"""Run by each of two ranks: what the engine does with gradients and parameters, and what it finds out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from small import items, latents, make_run

from trainer import cli, ranks
from trainer.dataset import Dataset
from trainer.engine import Engine
from trainer.hooks import Context
from trainer.hooks.checkpoints import Checkpoints, Drifted
from trainer.loop import NonFiniteLoss, train
from trainer.rundir import RunDir


def main(out: Path) -> None:
    args = cli.validate({"data": {"source": "x"}, "runtime": {"device": "cpu"}})
    with ranks.joined() as here:
        engine = Engine(args.runtime, "fp32", here)
        found: dict[str, Any] = {"device": str(engine.device), "rows": engine.gathered([f"a{here.rank}", here.rank])}
        found["mean"] = averaged(engine)
        start = torch.nn.Parameter(torch.full((2, 3), 1.0 + here.rank))
        engine.equalise([start])
        found["start"] = start.tolist()
        checkpoints = Checkpoints(Context(RunDir(out), args))
        found["alike"] = not isinstance(saved(engine, checkpoints, 1), Drifted)
        found["drifted"] = str(saved(engine, checkpoints, 2, by=1e-7 * here.rank))
        found["not finite"] = poisoned(engine)
        engine.release()
    (out / f"rank_{here.rank}.json").write_text(json.dumps(found))


def averaged(engine: Engine) -> list[Any]:
    """Of a gradient on both ranks, one on rank 1 alone, one on none, and one of half precision."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters.append(torch.nn.Parameter(torch.zeros(1, dtype=torch.float16)))
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (1 + 2 * engine.rank)
    parameters[1].grad = torch.tensor([4.0, 6.0]) if engine.rank else None
    parameters[3].grad = torch.tensor([60000.0], dtype=torch.float16)  # whose sum only float32 holds
    engine.average(parameters)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def saved(engine: Engine, checkpoints: Checkpoints, step: int, by: float = 0.0) -> Path | Drifted:
    run = make_run()
    run.engine = engine
    with torch.no_grad():
        next(iter(run.components.values()))[0][1].add_(by)
    try:
        return checkpoints.save(run, step)
    except Drifted as error:
        return error


def poisoned(engine: Engine) -> list[str]:
    """The messages of a run whose second update meets a loss that is not finite, on rank 1 alone."""
    pictures = items([(32, 32)] * 4)
    run = make_run(steps=3, caption_dropout=0.0)
    held = latents(pictures)
    run.dataset = Dataset(pictures, held, batch_size=1, seed=3)
    run.engine = engine
    if engine.rank:
        held[run.dataset.micro(3).names[0]][:] = torch.nan
    steps = train(run)
    messages = [str(next(steps).images)]
    try:
        next(steps)
    except NonFiniteLoss as error:
        messages.append(str(error))
    return messages


if __name__ == "__main__":
    main(Path(sys.argv[1]))
