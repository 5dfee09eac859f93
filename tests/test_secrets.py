"""A key in an address reaches the server that it is for, and no file of the run and no line of the log."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from preprocess.source import kept, shown_all
from trainer.__main__ import main

SECRET = "SIGNATURE0123456789"
QUICK = [
    *("--runtime.steps", "2", "--runtime.batch_size", "2", "--runtime.checkpoint_every", "1", "--adapter.rank", "2"),
    *("--text.tokens", "0", "--sample.strengths=1", "--data.resolution", "32", "--no-hooks.tensorboard"),
    *("--runtime.device", "cpu", "--sample.steps", "1", "--sample.prompts", "{trigger}", "--data.private_urls"),
]


@contextmanager
def presigned(pictures: Path) -> Iterator[str]:
    """A server that gives the pictures only to whoever has the key."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(pictures.iterdir()):
            archive.write(path, path.name)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = buffer.getvalue() if self.path == f"/set.zip?X-Signature={SECRET}" else b"no"
            self.send_response(200 if body != b"no" else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/set.zip"
        finally:
            server.shutdown()
            thread.join()


def holders(folder: Path) -> list[str]:
    """Files that hold the key, in their names too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if SECRET.encode() in path.read_bytes() or SECRET in str(path)]


def test_a_presigned_address_is_used_and_kept_nowhere(
    tiny_base: Path, tiny_pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    words = ["--model.base", str(tiny_base), "--runtime.out", str(out), *QUICK]
    with presigned(tiny_pictures) as address:
        whole = f"{address}?X-Signature={SECRET}"
        assert main(["object", whole, *words]) == 0
        assert json.loads((out / "run/args.json").read_text())["data"]["source"] == f"{address}?***"
        for name in ("log.txt", "report.html", "dataset.jsonl"):
            assert (out / "run" / name).stat().st_size > 100
        assert holders(tmp_path) == []

        assert main(["--resume", str(out / "run")]) == 0
        (out / "run/dataset.jsonl").unlink()
        assert main(["--resume", str(out / "run")]) == 2
        assert "was kept without its query, which may be a key: give the whole address again" in capfd.readouterr().err
        assert main(["--resume", str(out / "run"), "--data.source", whole]) == 0
        assert holders(tmp_path) == []

        assert main([str(out / "run/args.json"), "--runtime.name", "again"]) == 2
        assert "give the whole address again as --data.source" in capfd.readouterr().err
        assert main(["object", f"{address}?X-Signature=EXPIRED{SECRET}", *words, "--runtime.name", "expired"]) == 2
    said = capfd.readouterr()
    assert "the server answers 403" in said.err
    assert SECRET not in said.err + said.out
    assert holders(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "shown", "saved"),
    [
        ("https://h/a.zip?k=1", "https://h/a.zip", "https://h/a.zip?***"),
        ("https://u:p@h/a.zip", "https://h/a.zip", "https://h/a.zip?***"),
        ("https://h/a b.zip?k=1 2&c=3", "https://h/a b.zip", "https://h/a b.zip?***"),
        ("https://h/a.zip", "https://h/a.zip", "https://h/a.zip"),
        ("https://h/a.zip?***", "https://h/a.zip", "https://h/a.zip?***"),
        ("a?k=1|https://h/b?k=1 | c", "a?k=1|https://h/b | c", "a?k=1|https://h/b?*** | c"),
        ('["https://h/a?k=1", "https://h/b" , "c"]', '["https://h/a", "https://h/b" , "c"]',
         '["https://h/a?***", "https://h/b" , "c"]'),
        ("/pictures/what?", "/pictures/what?", "/pictures/what?"),
    ],
)  # fmt: skip
def test_what_is_shown_and_kept_of_a_source(given: str, shown: str, saved: str) -> None:
    assert shown_all(given) == shown
    assert kept(given) == saved
    assert kept(saved) == saved
