"""A Hugging Face hub on the loopback, for the real client: it gives data sets out and takes nothing in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0" * 20
_API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")
_FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")

Repos = Mapping[str, Mapping[str, bytes]]  # owner/name -> path -> content


class Hub(ThreadingHTTPServer):
    def __init__(self, repos: Repos) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.asked: list[str] = []  # method and path
        self.tokens: set[str] = set()
        self.sent = 0  # bytes of files

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization", ""))
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size).decode()
        if found := _FILE.fullmatch(path):
            self._file(*found.groups())
        elif found := _API.fullmatch(path):
            self._api(body, *found.groups())
        else:
            self._send(404, {"error": "no such page"})

    def _refused(self, name: str, revision: str | None) -> bool:
        """Whether the repository is not given out; then it is said."""
        if name.startswith("gated/"):
            self._send(403, {"error": "ask for access"}, X_Error_Code="GatedRepo")
        elif name not in self.server.repos:
            self._send(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self._send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        else:
            return False
        return True

    def _file(self, name: str, revision: str, path: str) -> None:
        if self._refused(name, revision):
            return
        content = self.server.repos[name].get(path)
        if content is None:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        headers = {"ETag": f'"{_oid(content)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part:
            start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        self._send(206 if part else 200, content, **headers)
        self.server.sent += len(content) * (self.command == "GET")

    def _api(self, body: str, name: str, what: str | None, revision: str | None, folder: str | None) -> None:
        if self._refused(name, revision):
            return
        files = self.server.repos[name]
        if what == "tree":
            recursive = "recursive=true" in self.path.lower()
            inside = [path for path in files if not folder or path.startswith(f"{folder}/")]
            if folder and not inside:
                self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
                return
            self._send(200, _tree(files, inside, folder or "", recursive=recursive))
        elif what == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            found = [entry for path in asked for entry in _entry(files, path)]
            self._send(200, found)
        else:
            siblings = [{"rfilename": path} for path in files]
            self._send(200, {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                             "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def _send(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _entry(files: Mapping[str, bytes], path: str) -> list[dict[str, Any]]:
    if path in files:
        return [{"type": "file", "path": path, "size": len(files[path]), "oid": _oid(files[path])}]
    if any(file.startswith(f"{path}/") for file in files):
        return [{"type": "directory", "path": path, "oid": _oid(path.encode())}]
    return []


def _tree(files: Mapping[str, bytes], inside: list[str], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    depth = len(folder.split("/")) if folder else 0
    parts = {path: path.split("/") for path in inside}
    names = {"/".join(part[:n]) for part in parts.values() for n in range(depth + 1, len(part) + 1)}
    shown = [name for name in sorted(names) if recursive or len(name.split("/")) == depth + 1]
    return [entry for name in shown for entry in _entry(files, name)]


@contextmanager
def serving(repos: Repos) -> Iterator[Hub]:
    with Hub(repos) as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
