"""What stands behind Cog's inputs: flat inputs -> args -> a run in a temporary folder -> one tar of what it made."""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preprocess.fetch import is_url
from preprocess.source import named
from trainer import cli, console, run
from trainer.args import LimitsArgs
from trainer.rundir import RunDir

# Cog's flat input -> option of the tree. An input that was left blank does not appear in the args.
OPTIONS = {
    "input_images": "data.source",
    "trigger_word": "data.trigger",
    "resolution": "data.resolution",
    "lora_rank": "adapter.rank",
    "learning_rate": "optim.adapter.lr",
    "ti_lr": "optim.rows.lr",
    "batch_size": "runtime.batch_size",
    "steps": "runtime.steps",
    "seed": "runtime.seed",
}


def train(inputs: Mapping[str, Any]) -> Path:
    """A .tar with the run's export/, args.json, metrics and pictures. Input that cannot be used is a ValueError.

    Part specs that would import code are refused: whoever calls the server is not its operator.
    """
    folder = Path(tempfile.mkdtemp(prefix="tempera-"))
    args = cli.validate(cli.merge([tree(inputs), {"runtime": {"out": str(folder), "name": "trained_model"}}]))
    if args.data.private_urls or args.data.limits != LimitsArgs.model_validate({}):
        raise cli.CommandError(
            "data.private_urls and data.limits are for the operator of this server, not for its callers"
        )
    ordinary = args.data.regularisation.source
    if ordinary is not None and not all(is_url(one) for one in named(ordinary, args.data.limits)):
        raise cli.CommandError(
            "data.regularisation.source must be an http(s) URL here: files of the server are not yours"
        )
    with console.shown(), run.opened(args, code=False) as session:
        for _ in session.steps():
            pass
    return pack(session.dir, folder / "trained_model.tar")


def tree(inputs: Mapping[str, Any]) -> cli.Tree:
    """The args tree of Cog's inputs: the concept mode's preset, then `args`, then the flat inputs."""
    layers = [cli.preset(str(inputs["concept_mode"])), _json_object(str(inputs["args"]))]
    for name, option in OPTIONS.items():
        value = inputs[name]
        if value is not None:
            leaf = str(value) if isinstance(value, os.PathLike) else value
            section: cli.Tree = {option.rsplit(".", 1)[1]: leaf}
            for part in reversed(option.split(".")[:-1]):
                section = {part: section}
            layers.append(section)
    return cli.merge(layers)


def pack(run_dir: RunDir, path: Path) -> Path:
    """An uncompressed tar that opens as a run directory: what a generator needs, and what a person wants to see."""
    with tarfile.open(path, "w") as tar:
        for part in (
            run_dir.args,
            run_dir.env,
            run_dir.metrics,
            run_dir.log,
            run_dir.report,
            run_dir.grid,
            run_dir.export,
        ):
            if part.exists():
                tar.add(part, arcname=str(part.relative_to(run_dir.root)))
    return path


def _json_object(text: str) -> cli.Tree:
    try:
        value: Any = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise cli.CommandError(f"args is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise cli.CommandError('args must be a JSON object of sections, such as {"adapter": {"rank": 4}}')
    return value
