"""Cog's real server, started without Docker as it runs in the image: the whole job through it, and what it costs.

python -m bench.cog job OUT        trains the quickstart's zip, draws with what came back; OUT gets tar and pictures
python -m bench.cog job OUT --docker IMAGE   the same with servers in containers of an image that cog built
python -m bench.cog measure        bench/results/cog.json: times, and what 20 requests in a row leave behind
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from trainer import cog_schema

ROOT = Path(__file__).resolve().parent.parent
START_S = 600.0  # on a machine that is busy with something else, too
ZIP = ROOT / "testbed/quickstart/mushroom.zip"
PROMPTS = ("a yellow TOK on a green background", "a striped blue TOK on a cyan background")
RESULTS = ROOT / "bench/results/cog.json"


class Server:
    def __init__(self, process: subprocess.Popen[bytes], port: int, folder: Path, log: Path) -> None:
        self.process, self.port, self.folder, self.log = process, port, folder, log
        self.temporary = folder / "tmp"
        self.kept = folder / "kept"

    def ask(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """(status, JSON or text)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        try:
            sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, sent, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except json.JSONDecodeError:
            return response.status, text.decode(errors="replace")

    def post(self, what: str, given: Mapping[str, object], **more: object) -> tuple[int, Any]:
        return self.ask("POST", f"/{what}", {"input": given, **more})

    def state(self) -> str:
        return str(self.ask("GET", "/health-check")[1]["status"])

    def wait(self, *states: str, seconds: float = START_S) -> None:
        deadline = time.monotonic() + seconds
        while (state := self.state()) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server is {state}: {self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    def worker(self) -> int:
        """Process id of what runs the code."""
        (worker,) = psutil.Process(self.process.pid).children()
        return worker.pid

    def leftovers(self) -> list[str]:
        """Files in the temporary folder, but Cog's own: spilled answers, and empty files of what it could not fetch."""
        return sorted(
            str(path.relative_to(self.temporary))
            for path in self.temporary.rglob("*")
            if path.is_file() and path.stat().st_size and "spill_" not in path.name
        )


@contextmanager
def server(folder: Path, mode: str, **environment: str) -> Iterator[Server]:
    """A server in `mode` (train, predict) on a free port, whose temporary and kept files are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    code = folder / "src"  # like /src of the image, so that nothing is written beside the sources
    if not code.exists():
        code.mkdir()
        for name in ("train.py", "predict.py", "trainer", "preprocess", "testbed", "presets"):
            (code / name).symlink_to(ROOT / name)
        cog_schema.main([str(code / cog_schema.PLACE)])
    (folder / "tmp").mkdir(exist_ok=True)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # its worker is plain `python`
        "PORT": "0",
        "LOG_FORMAT": "console",
        "TMPDIR": str(folder / "tmp"),
        "TEMPERA_KEPT": str(folder / "kept"),
        "COG_PREDICT_TYPE_STUB": "predict.py:Runner",
        "COG_TRAIN_TYPE_STUB": "train.py:train",
        **environment,
    }
    log = folder / f"{mode}.log"
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1", "--x-mode", mode]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=code, env=env, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"coglet server on 127\.0\.0\.1:(\d+)", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text()}")
            time.sleep(0.05)
        running = Server(process, int(found.group(1)), folder, log)
        running.wait("READY", seconds=START_S)
        yield running
    finally:
        _ended(process)


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def container(folder: Path, mode: str, image: str) -> Iterator[Server]:
    """The same in a container. Its files go with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gpus = ["--gpus", "all"] if shutil.which("nvidia-smi") else []
    command = ["docker", "run", "--rm", *gpus, "-p", f"127.0.0.1:{port}:5000", image]
    log = folder / f"{mode}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "python", "-m", "cog.server.http", "--x-mode", mode], stdout=out, stderr=out
        )
    try:
        running, deadline = Server(process, port, folder, log), time.monotonic() + START_S
        while True:
            try:
                running.wait("READY", seconds=START_S)
                break
            except OSError as error:  # nobody listens yet
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the container did not start: {log.read_text()}") from error
                time.sleep(0.5)
        yield running
    finally:
        _ended(process)


def data_url(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def content_of(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def succeeded(running: Server, what: str, given: Mapping[str, object]) -> dict[str, Any]:
    running.wait("READY")
    status, answer = running.post(what, given)
    if status != 200 or answer["status"] != "succeeded":
        raise RuntimeError(f"{what}: {status} {answer}")
    return answer


def job(out: Path, image: str | None, given: Mapping[str, object], prompts: Sequence[str] = PROMPTS) -> list[Path]:
    """Trains through one server, draws through the other; the files that came of it."""
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="cog-") as scratch:
        folder = Path(scratch)

        def running(mode: str) -> Any:
            return container(folder, mode, image) if image else server(folder, mode)

        with running("train") as trainer:
            answer = succeeded(trainer, "trainings", {"input_images": data_url(ZIP.read_bytes()), **given})
        files = [out / "trained_model.tar"]
        files[0].write_bytes(content_of(answer["output"]["weights"]))
        (out / "log.txt").write_text(answer["logs"], encoding="utf-8")
        with running("predict") as painter:
            for prompt in prompts:
                asked = {"prompt": prompt, "replicate_weights": data_url(files[0].read_bytes()), "num_outputs": 2}
                for url in succeeded(painter, "predictions", {**asked, "seed": 0})["output"]:
                    files.append(out / f"{len(files):02d}.png")
                    files[-1].write_bytes(content_of(url))
    return files


# --- what it costs


def measure() -> dict[str, Any]:
    """On the testbed base, with weights of two updates: times do not depend on how good they are."""
    args = json.dumps({"sample": {"steps": 1}, "hooks": {"tensorboard": False}, "runtime": {"device": "cpu"}})
    short = {"input_images": data_url(ZIP.read_bytes()), "steps": 2, "n_sample_imgs": 1, "args": args}
    with tempfile.TemporaryDirectory(prefix="cog-") as scratch:
        with server(Path(scratch) / "t", "train") as trainer:
            tars = [succeeded(trainer, "trainings", {**short, "seed": s})["output"]["weights"] for s in (0, 1)]
            cancel = [_cancel_s(trainer, {**short, "steps": 2000}, f"c{n}") for n in range(5)]
            trainings = _repeated(trainer, "trainings", [short])
        with server(Path(scratch) / "p", "predict") as painter:
            asked = {"prompt": "a TOK", "num_inference_steps": 1, "seed": 0}
            _, first = _timed(painter, {**asked, "replicate_weights": tars[0]})
            _, again = _timed(painter, {**asked, "replicate_weights": tars[0]})
            given = [{**asked, "replicate_weights": tar} for tar in tars]
            predictions = _repeated(painter, "predictions", given)
    return {
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "cancel to ready, s": cancel,
        "first picture with new weights on a warm base, one step, s": first,
        "the same once more, s": again,
        "20 trainings": trainings,
        "20 predictions, two weights in turn": predictions,
    }


def _timed(running: Server, given: Mapping[str, object]) -> tuple[dict[str, Any], float]:
    began = time.monotonic()
    return succeeded(running, "predictions", given), time.monotonic() - began


def _cancel_s(running: Server, given: Mapping[str, object], name: str) -> float:
    running.wait("READY")
    put = {"input": given}, {"Prefer": "respond-async"}
    running.ask("PUT", f"/trainings/{name}", *put)
    while "step" not in json.dumps(running.ask("PUT", f"/trainings/{name}", *put)[1].get("metrics")):
        time.sleep(0.05)
    began = time.monotonic()
    running.ask("POST", f"/trainings/{name}/cancel")
    running.wait("READY")
    return round(time.monotonic() - began, 2)


def _repeated(running: Server, what: str, given: Sequence[Mapping[str, object]], count: int = 20) -> dict[str, Any]:
    """Memory, threads and temporary files of the worker after 5 and after `count` requests more."""
    for number in range(5):
        succeeded(running, what, given[number % len(given)])
    before = _state(running)
    seconds: list[float] = []
    for number in range(count):
        began = time.monotonic()
        succeeded(running, what, given[number % len(given)])
        seconds.append(time.monotonic() - began)
    return {"before": before, "after": _state(running), "median, s": round(statistics.median(seconds), 2)}


def _state(running: Server) -> dict[str, int]:
    said = Path(f"/proc/{running.worker()}/status").read_text()
    found = {key: int(value) for key, value in re.findall(r"(VmRSS|Threads):\s+(\d+)", said)}
    return {"MiB": found["VmRSS"] // 1024, "threads": found["Threads"], "files": len(running.leftovers())}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cog", description="The job through Cog's real server.")
    parser.add_argument("what", choices=("job", "measure"))
    parser.add_argument("out", type=Path, nargs="?", help="job: a folder that is not there yet")
    parser.add_argument("--docker", metavar="IMAGE", help="job: an image that `cog build` made")
    parser.add_argument("--steps", type=int, default=300, help="job: updates [default: 300]")
    options = parser.parse_args(argv)
    if options.what == "measure":
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
        print(RESULTS)
        return 0
    if options.out is None or options.out.exists():
        parser.error("job needs a folder that is not there yet")
    for file in job(options.out, options.docker, {"steps": options.steps, "args": '{"runtime": {"threads": 1}}'}):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
