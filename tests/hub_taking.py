"""A Hugging Face Hub on the loopback that takes uploads, for the real client: repositories, LFS, commits."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}  # owner/name/path
        self.stored: dict[str, bytes] = {}  # sha256 -> content
        self.full = False  # refuses commits

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_PUT(self) -> None:
        self.server.stored[self.path.rsplit("/", 1)[1]] = self._body()
        self._send(200, {})

    def do_GET(self) -> None:
        self._send(404, {"error": "no such page"})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._send(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            self._preupload(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            self._commit(found[1], body)
        else:
            self._send(404, {"error": f"no {self.path}"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = name in self.server.private
        self.server.private.setdefault(name, asked.get("visibility") == "private")
        self._send(409 if there else 200, {"url": f"{self.server.url}/{name}", "id": name})

    def _preupload(self, asked: dict[str, Any]) -> None:
        modes = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
             "shouldIgnore": False, "oid": None} for one in asked["files"]
        ]  # fmt: skip
        self._send(200, {"files": modes})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "authenticated": True, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, body: bytes) -> None:
        if self.server.full:
            self._send(403, {"error": "Storage quota exceeded"})
            return
        for line in body.splitlines():
            said = json.loads(line)
            if said["key"] == "file":
                self.server.files[f"{repo}/{said['value']['path']}"] = base64.b64decode(said["value"]["content"])
            elif said["key"] == "lfsFile":
                self.server.files[f"{repo}/{said['value']['path']}"] = self.server.stored[said["value"]["oid"]]
        self._send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/c0", "commitOid": "c0" * 20})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def taking(token: str) -> Iterator[Hub]:
    with Hub(token) as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
