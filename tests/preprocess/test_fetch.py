"""URLs: what an honest server gives, and what a hostile one costs. All servers stand on this machine."""

from __future__ import annotations

import logging
import select
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hostile import SQUEEZE, everything, png, tarred, zipped

from preprocess import Limits, PreprocessError, fetch, ingest
from preprocess.fetch import download, shown
from preprocess.network import addresses, public

Answer = Callable[[socket.socket, int], None]  # the connection, how many came before


@contextmanager
def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server of one connection at a time, which reads a request and leaves the rest to `answer`."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(0.05)
        stop = threading.Event()

        def run() -> None:
            count = 0
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection, suppress(OSError):
                    connection.settimeout(60)
                    if tls:
                        connection = tls.wrap_socket(connection, server_side=True)
                    connection.recv(65536)  # a request is short: it comes at once
                    answer(connection, count)
                count += 1

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop.set()
            thread.join()


def reply(body: bytes, status: str = "200 OK", **headers: Any) -> Answer:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    if "Content_Length" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    content = "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body
    return lambda connection, _: connection.sendall(content)


def leading(to: str) -> Answer:
    return reply(b"", "302 Found", Location=to)


def no_sleep(seconds: float) -> None:
    del seconds


def fetched(url: str, **options: Any) -> bytes:
    limits = Limits(**{"wait_s": 60, "tries": 2} | options)
    with download(url, limits, private=True, sleep=no_sleep).file as file:
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("content", [zipped(), tarred(), SQUEEZE["zst"](tarred())], ids=["zip", "tar", "zst"])
def test_an_archive_at_a_url(tmp_path: Path, content: bytes) -> None:
    with serving(reply(content)) as url:
        items, skipped = ingest(f"{url}/set?key=secret", tmp_path / "run", private_urls=True)
    assert ([item.source for item in items], skipped) == (["a.png", "b.png"], [])
    assert {path for path in everything(tmp_path) if not path.startswith("run/cache")} == {"run"}


def test_pictures_at_urls(tmp_path: Path) -> None:
    answers = [reply(png()), reply(png("blue"))]
    with serving(lambda connection, count: answers[count](connection, count)) as url:
        items, _ = ingest(f"{url}/x/red%20one.png | {url}/blue", tmp_path / "run", private_urls=True)
    assert [item.source for item in items] == ["blue/blue", "red%20one/red one.png"]


def test_a_private_address_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    with serving(reply(zipped())) as url, pytest.raises(PreprocessError) as error:
        ingest(f"{url}/set.zip", tmp_path / "run")
    host = f"{url}/set.zip"
    assert str(error.value) == (
        f"{host} is refused: 127.0.0.1 is at 127.0.0.1, inside a private network; "
        "data.private_urls allows such addresses"
    )


def test_a_redirect_into_a_private_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first host counts as public here; where it leads to is looked at anew."""
    monkeypatch.setattr("preprocess.network.public", lambda address: address == "127.0.0.1")
    with serving(leading("http://169.254.169.254/latest/meta-data")) as url, pytest.raises(PreprocessError) as error:
        download(url, Limits(wait_s=2), sleep=no_sleep)
    assert "http://169.254.169.254/latest/meta-data is refused: 169.254.169.254 is at" in str(error.value)


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "172.16.9.9", "192.168.1.1", "127.0.0.1", "0.0.0.0", "169.254.169.254", "100.64.0.1", "224.0.0.1",
     "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1",
     "::ffff:10.0.0.1", "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1", "2001:0:a00:1::5601:fefe"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert public(address)


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "localhost", "[::1]"])
def test_a_private_address_in_disguise_is_seen(host: str) -> None:
    with pytest.raises(ValueError, match="inside a private network"):
        addresses(host, 80, private=False)


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ValueError, match=r"twofaced\.example is at 10\.0\.0\.1"):
        addresses("twofaced.example", 80, private=False)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("ftp://host/a.zip", "'ftp://host/a.zip' is refused: only http:// and https:// URLs are fetched"),
        ("file:///etc/passwd", "'file:///etc/passwd' is refused: only http:// and https:// URLs are fetched"),
        ("http://", "'http://' is refused: only http:// and https:// URLs are fetched"),
        ("http://h:99999999/", "'http://h:99999999/' is no URL: there is no port 99999999"),
        ("http://me:pass@host/a.zip?k=v", "http://host/a.zip is given with a password"),
    ],
)
def test_urls_that_are_not_fetched(tmp_path: Path, url: str, sentence: str) -> None:
    with pytest.raises(PreprocessError) as error:
        ingest(url, tmp_path / "run")
    assert sentence in str(error.value)
    assert "pass@" not in str(error.value)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "gopher://h/", "http://[::1"])
def test_a_redirect_out_of_the_web_is_refused(to: str) -> None:
    with serving(leading(to)) as url, pytest.raises(PreprocessError, match=r"is refused: only http|is no URL"):
        fetched(url)


def test_a_redirect_from_https_to_http_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_request", lambda url, rules: f"http://{url.host}/a?key=1")
    with pytest.raises(PreprocessError) as error:
        download("https://h/", Limits(), sleep=no_sleep)
    assert str(error.value) == "https://h/ is refused: it leads from https to http://h/a, which is not"


def test_a_server_that_speaks_no_tls() -> None:
    with serving(reply(b"x")) as url, pytest.raises(PreprocessError, match=r"cannot be downloaded: .*, 2 times"):
        fetched(url.replace("http", "https"))


@pytest.mark.skipif(not shutil.which("openssl"), reason="a certificate is made by the openssl program")
def test_a_certificate_that_nobody_signed_is_refused(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-keyout", key]
    subprocess.run([*command, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(reply(b"x"), context) as url, pytest.raises(PreprocessError, match="its certificate is not trusted"):
        fetched(url.replace("http", "https"))


def test_redirects_are_followed_and_counted() -> None:
    steps = [leading("/b"), leading("c"), reply(b"here")]
    with serving(lambda connection, count: steps[count](connection, count)) as url:
        assert fetched(url) == b"here"
    with serving(leading("/again")) as url, pytest.raises(PreprocessError, match="it leads on more than 3 times"):
        fetched(url, redirects=3)


@pytest.mark.parametrize(
    ("status", "why"),
    [(401, ": it wants a password"), (403, ": it is not public"), (404, ": it is not there"), (418, "")],
)
def test_a_plain_no_is_not_asked_again(status: int, why: str) -> None:
    asked: list[int] = []

    def answer(connection: socket.socket, count: int) -> None:
        asked.append(count)
        reply(b"", f"{status} No")(connection, count)

    with serving(answer) as url, pytest.raises(PreprocessError) as error:
        fetched(f"{url}/a?token=1")
    assert str(error.value) == f"{url}/a cannot be downloaded: the server answers {status}{why}"
    assert asked == [0]


def test_a_busy_server_is_asked_again_after_the_time_it_names(caplog: pytest.LogCaptureFixture) -> None:
    steps = [
        reply(b"", "503 Busy"),
        reply(b"", "429 Slow", Retry_After=7),
        reply(b"", "500 Oh", Retry_After=99999),
        reply(b"ok"),
    ]
    slept: list[float] = []
    with serving(lambda connection, count: steps[count](connection, count)) as url, caplog.at_level(logging.WARNING):
        download(f"{url}/a?token=secret", Limits(tries=4), private=True, sleep=slept.append).file.close()
    assert slept == [1, 7, 60]
    assert "trying again" in caplog.text
    assert "secret" not in caplog.text


def test_a_server_that_stays_busy_is_given_up() -> None:
    with serving(reply(b"", "503 Busy")) as url, pytest.raises(PreprocessError) as error:
        fetched(url, tries=3)
    assert str(error.value) == f"{url} cannot be downloaded: the server answers 503, 3 times (data.limits.tries)"


def test_a_server_that_breaks_off_once_is_asked_again() -> None:
    steps = [reply(b"half", Content_Length=8), lambda connection, count: connection.close(), reply(b"complete")]
    with serving(lambda connection, count: steps[count](connection, count)) as url:
        assert fetched(url, tries=3) == b"complete"


def test_nobody_there() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    with pytest.raises(PreprocessError, match=r"cannot be downloaded: .*refused, 2 times"):
        fetched(f"http://127.0.0.1:{port}/")


def test_a_name_that_is_none() -> None:
    with pytest.raises(PreprocessError, match=r"the name nowhere\.invalid cannot be resolved, 2 times"):
        fetched("http://nowhere.invalid/")


def test_a_length_that_is_too_much_is_refused_before_it_is_sent() -> None:
    with serving(reply(b"", Content_Length=10**9)) as url, pytest.raises(PreprocessError) as error:
        fetched(url, total_bytes=10**6)
    assert (
        str(error.value)
        == f"{url} is refused: it has 1000000000 bytes, and 1000000 are allowed (data.limits.total_bytes)"
    )


def test_a_length_that_is_more_than_what_comes() -> None:
    with serving(reply(b"little", Content_Length=100)) as url, pytest.raises(PreprocessError, match="2 times"):
        fetched(url)


def test_what_comes_after_the_stated_length_is_not_taken() -> None:
    with serving(reply(b"stated and more", Content_Length=6)) as url:
        assert fetched(url) == b"stated"


def test_nothing_is_no_download() -> None:
    with serving(reply(b"")) as url, pytest.raises(PreprocessError, match="it sent 0 bytes, 2 times"):
        fetched(url)


def endless(head: bytes, piece: bytes, wait_s: float = 0.0) -> Answer:
    """A piece and another, until who asked has gone; a minute is for ever, as far as these tests go."""

    def answer(connection: socket.socket, _: int) -> None:
        connection.sendall(head)
        until = time.monotonic() + 60
        while time.monotonic() < until and not left(connection):
            connection.sendall(piece)
            time.sleep(wait_s)

    return answer


def left(connection: socket.socket) -> bool:
    """Whether the other end, which has nothing more to say, has closed the connection."""
    return bool(select.select([connection], [], [], 0)[0]) and not connection.recv(1)


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(("head", "piece"), [(HEAD, bytes(65536)), (CHUNKED, b"10000\r\n" + bytes(65536) + b"\r\n")])
def test_a_body_without_end_is_cut_off(head: bytes, piece: bytes) -> None:
    with serving(endless(head, piece)) as url, pytest.raises(PreprocessError) as error:
        fetched(url, total_bytes=10**6)
    assert str(error.value) == f"{url} is refused: it has more than 1000000 bytes (data.limits.total_bytes)"


@pytest.mark.parametrize(
    ("head", "piece", "options", "sentence"),
    [
        (b"", b"", {"wait_s": 0.3}, "did not answer within 0.3 s"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", {"wait_s": 0.3}, "did not answer within 0.3 s"),
        (HEAD, b"x", {"wait_s": 1.0}, r"bytes in \d+ s, and 1000 a second are expected"),
        (HEAD, b"x" * 9999, {"wait_s": 60, "download_s": 0.8, "slowest": 0}, "more than 0.8 s in all"),
    ],
    ids=["silent", "headers for ever", "drip", "slow"],
)
def test_a_server_that_takes_its_time_is_left(
    head: bytes, piece: bytes, options: dict[str, float], sentence: str
) -> None:
    with serving(endless(head, piece, 0.02)) as url, pytest.raises(PreprocessError, match=sentence):
        fetched(url, tries=1, **options)


@pytest.mark.parametrize(
    "head", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"HTTP/9 x\r\n\r\n",
             b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"\0" * 300,
             b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000],
)  # fmt: skip
def test_what_is_no_http_is_answered_in_a_sentence(head: bytes) -> None:
    with (
        serving(lambda connection, _: connection.sendall(head)) as url,
        pytest.raises(PreprocessError, match="cannot be downloaded"),
    ):
        fetched(url)


def test_what_may_be_a_key_is_never_shown() -> None:
    assert shown("https://me:pw@host:8/a.zip?sig=abc#x") == "https://host:8/a.zip"
    assert shown("/a/b?.zip") == "/a/b?.zip"
