"""A site on the loopback for what Cog's server fetches, and the server itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from bench.cog import ROOT, Server, server

__all__ = ["ROOT", "Server", "Site", "server", "site"]


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
