"""Cog's real server in a subprocess on the loopback, as it would run in the image: schema and all."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

from trainer import cog_schema

ROOT = Path(__file__).parents[1]
START_S = 120.0


class Server:
    def __init__(self, process: subprocess.Popen[bytes], port: int, folder: Path, log: Path) -> None:
        self.process, self.port, self.folder, self.log = process, port, folder, log
        self.temporary = folder / "tmp"
        self.kept = folder / "kept"

    def ask(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """(status, JSON or text)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
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

    def wait(self, *states: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while (state := self.state()) not in states:
            assert time.monotonic() < deadline, (state, self.log.read_text()[-3000:])
            time.sleep(0.02)

    def worker(self) -> int:
        """Process id of what runs the code."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

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
        assert cog_schema.main([str(code / cog_schema.PLACE)]) == 0
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
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        running = Server(process, int(found.group(1)), folder, log)
        running.wait("READY", seconds=START_S)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Site(ThreadingHTTPServer):
    """Files on the loopback, some of them slow or elsewhere; and what was posted to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Page)
        self.files: dict[str, bytes] = {}
        self.posted: list[dict[str, Any]] = []
        self.asked = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Page(BaseHTTPRequestHandler):
    """/x gives x; /moved/x leads to /x; /slow/x takes a second and a half; /stuck/x never ends."""

    server: Site

    def do_GET(self) -> None:
        how, _, name = self.path[1:].rpartition("/")
        self.server.asked.set()
        if how == "moved":
            self.send_response(302)
            self.send_header("Location", f"/{name}")
            self.end_headers()
            return
        content = self.server.files.get(name)
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        parts = 5 if how in ("slow", "stuck") else 1
        size = -(-len(content or b"x") // parts)
        for number in range(parts):
            if how == "stuck" and number == 2:
                time.sleep(30)
            elif how and number:
                time.sleep(0.3)
            with suppress(BrokenPipeError):  # who asked has gone
                self.wfile.write((content or b"")[number * size : (number + 1) * size])

    def do_POST(self) -> None:
        self.server.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def site() -> Iterator[Site]:
    with Site() as here:
        thread = Thread(target=here.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield here
        finally:
            here.shutdown()
            thread.join()
