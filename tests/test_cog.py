"""The Cog doors: the file, the literal signatures, and one training and one drawing through the real server."""

from __future__ import annotations

import ast
import base64
import http.client
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer import cli, cog_door
from trainer.predict_door import unpack
from trainer.registry import PartError

ROOT = Path(__file__).parents[1]
BLANK: dict[str, Any] = {**dict.fromkeys(cog_door.OPTIONS), "concept_mode": "object", "args": "{}"}


def test_cog_yaml_names_what_exists() -> None:
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert config.keys() == {"build", "environment", "run", "train"}
    build = config["build"]
    assert isinstance(build["python_version"], str)
    assert isinstance(build["cuda"], str)
    assert (ROOT / build["python_requirements"]).is_file()
    for key, kind in (("run", ast.ClassDef), ("train", ast.FunctionDef)):
        file, _, name = config[key].partition(":")
        body = ast.parse((ROOT / file).read_text()).body
        assert [node for node in body if isinstance(node, kind) and node.name == name], config[key]


@pytest.mark.parametrize(("file", "name"), [("train.py", "train"), ("predict.py", "run")])
def test_inputs_are_literal(file: str, name: str) -> None:
    """Cog parses the signature and silently drops what it cannot read."""
    functions = [n for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)]
    arguments = next(n for n in functions if n.name == name).args
    assert len(arguments.defaults) == len([a for a in arguments.args if a.arg != "self"]) > 5
    for default in arguments.defaults:
        assert isinstance(default, ast.Call)
        assert not default.args
        for keyword in default.keywords:
            ast.literal_eval(keyword.value)


def test_every_training_input_is_used() -> None:
    functions = [n for n in ast.walk(ast.parse((ROOT / "train.py").read_text())) if isinstance(n, ast.FunctionDef)]
    names = {a.arg for a in next(n for n in functions if n.name == "train").args.args}
    assert names == BLANK.keys()
    assert set(cog_door.OPTIONS.values()) <= cli.options().keys()


def test_inputs_become_args() -> None:
    given = {"input_images": "x.zip", "concept_mode": "style", "steps": 7, "ti_lr": 0.5}
    tree = cog_door.tree({**BLANK, **given, "args": '{"adapter": {"alpha": 3}, "optim": {"rows": {"warmup": 0.1}}}'})
    args = cli.validate(tree)
    assert (args.runtime.steps, args.optim.rows.lr, args.optim.rows.warmup) == (7, 0.5, 0.1)
    assert (args.adapter.rank, args.adapter.alpha) == (16, 3.0), "blank: the preset's"
    with pytest.raises(ValueError, match="not JSON"):
        cog_door.tree({**BLANK, "args": "{"})
    with pytest.raises(ValueError, match=r"did you mean adapter\.rank"):
        cli.validate(cog_door.tree({**BLANK, **given, "args": '{"adapter": {"rnak": 3}}'}))


def test_a_caller_cannot_bring_code(tmp_path: Path) -> None:
    evil = tmp_path / "evil.py"
    evil.write_text("raise SystemExit('ran')")
    for args in ('{"adapter": {"kind": "%s:X"}}', '{"model": {"family": "%s:X"}}', '{"hooks": {"extra": ["%s:X"]}}'):
        with pytest.raises(PartError, match="would import code"):
            cog_door.train({**BLANK, "input_images": str(tmp_path), "args": args % evil})


@pytest.mark.parametrize("args", ['{"data": {"private_urls": true}}', '{"data": {"limits": {"entries": 1000000}}}'])
def test_a_caller_cannot_reach_into_the_operators_network(tmp_path: Path, args: str) -> None:
    with pytest.raises(ValueError, match="are for the operator of this server"):
        cog_door.train({**BLANK, "input_images": str(tmp_path), "args": args})


def test_a_tar_that_leads_out_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.tar"
    with tarfile.open(bad, "w") as tar:
        (tmp_path / "x").write_text("x")
        tar.add(tmp_path / "x", arcname="../../escaped")
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(bad)


# --- the real server


@contextmanager
def server(folder: Path, mode: str) -> Iterator[int]:
    """A Cog server in `mode` on a free port of the loopback."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # its worker is plain `python`
        "PORT": "0",
        "LOG_FORMAT": "console",
        "TMPDIR": str(folder),
        "COG_PREDICT_TYPE_STUB": "predict.py:Runner",
        "COG_TRAIN_TYPE_STUB": "train.py:train",
    }
    log = folder / f"{mode}.log"
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1", "--x-mode", mode]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 90
        while not (found := re.search(r"coglet server on 127\.0\.0\.1:(\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        port = int(found.group(1))
        while json.loads(ask(port, "GET", "/health-check"))["status"] != "READY":
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def ask(port: int, method: str, path: str, body: dict[str, object] | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    return connection.getresponse().read()


@pytest.mark.slow
def test_a_training_and_a_drawing_through_the_server(tiny_base: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    packed = tmp_path / "pictures.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in tiny_pictures.iterdir():
            archive.write(file, file.name)
    url = "data:application/zip;base64," + base64.b64encode(packed.read_bytes()).decode()
    args = {"model": {"base": str(tiny_base)}, "sample": {"steps": 2}, "runtime": {"device": "cpu"}}
    with server(tmp_path, "train") as port:
        given = {"input_images": url, "steps": 2, "batch_size": 2, "lora_rank": 3, "args": json.dumps(args)}
        answer = json.loads(ask(port, "POST", "/trainings", {"input": given}))
        assert answer["status"] == "succeeded", answer
        assert "step 2/2" in answer["logs"]
        wrong = json.loads(ask(port, "POST", "/trainings", {"input": {**given, "args": '{"adapter": {"rnak": 1}}'}}))
        assert wrong["status"] == "failed"
        assert "did you mean adapter.rank?" in wrong["error"]
    weights = answer["output"]["weights"]
    tar = tmp_path / "weights.tar"
    tar.write_bytes(base64.b64decode(weights.split(",", 1)[1]))
    with tarfile.open(tar) as opened:
        assert {"args.json", "report.html", "export/trained_model.safetensors"} <= set(opened.getnames())
    with server(tmp_path, "predict") as port:
        given = {"prompt": "a red TOK", "replicate_weights": weights, "num_outputs": 2, "num_inference_steps": 2}
        answer = json.loads(ask(port, "POST", "/predictions", {"input": given}))
        assert answer["status"] == "succeeded", answer
        assert [picture.split(";")[0] for picture in answer["output"]] == ["data:image/png"] * 2
