"""Downloads a URL of unknown intentions into a nameless temporary file, within bounds of size, time and place."""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast
from urllib.parse import unquote

import httpcore2
import httpx2

from preprocess.network import Backend, Deadline, PrivateAddressError
from preprocess.types import Limits, PreprocessError

Sleep = Callable[[float], None]
_Headers = Iterable[tuple[bytes, bytes]]

_log = logging.getLogger(__name__)
_REDIRECTS = {301, 302, 303, 307, 308}
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # the server says itself that it may pass
_LONGEST_WAIT = 60.0  # seconds between tries, whatever the server asks for
_HEADERS = [(b"User-Agent", b"tempera"), (b"Accept", b"*/*"), (b"Accept-Encoding", b"identity")]
_TROUBLE = (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.RemoteProtocolError)


@dataclass(frozen=True)
class Download:
    """What came of a URL. The file has no name, and is gone when it is closed."""

    file: IO[bytes]
    name: str  # the last part of the URL's path


@dataclass(frozen=True)
class _Rules:
    limits: Limits
    private: bool
    scratch: Path | None


class _AgainError(Exception):
    """This try failed, another one may not."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def is_url(source: str) -> bool:
    """Whether `source` names a scheme, as in https://host/set.zip."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def shown(source: str) -> str:
    """`source` as it may be shown and logged: a URL without its password and its query, which may be keys."""
    if not is_url(source):
        return source
    start, _, _ = re.sub(r"(?<=://)[^/?#]*@", "", source).partition("?")
    return start.partition("#")[0]


def download(
    url: str, limits: Limits, *, private: bool = False, scratch: Path | None = None, sleep: Sleep = time.sleep
) -> Download:
    """The content of an http or https URL.

    Args:
        private: also from addresses inside private networks.
        scratch: folder of the temporary file.

    Raises:
        PreprocessError: it cannot be had, or not within the limits.
        OSError: the temporary file cannot be written.
    """
    rules = _Rules(limits, private, scratch)
    reason = ""
    for count in range(1, limits.tries + 1):
        try:
            return _follow(url, rules)
        except _AgainError as error:
            reason = str(error)
            if count < limits.tries:
                wait = min(max(error.wait_s, 2.0 ** (count - 1)), _LONGEST_WAIT)
                _log.warning("%s: %s; trying again in %g s", shown(url), reason, wait)
                sleep(wait)
    raise PreprocessError(f"{shown(url)} cannot be downloaded: {reason}, {limits.tries} times (data.limits.tries)")


def _follow(url: str, rules: _Rules) -> Download:
    """One try, through all its redirects."""
    at = _parsed(url)
    for _ in range(rules.limits.redirects + 1):
        got = _request(at, rules)
        if isinstance(got, Download):
            return got
        target = _parsed(got, at)
        if at.scheme == "https" and target.scheme == "http":
            raise PreprocessError(f"{shown(url)} is refused: it leads from https to {shown(str(target))}, which is not")
        at = target
    raise PreprocessError(
        f"{shown(url)} is refused: it leads on more than {rules.limits.redirects} times (data.limits.redirects)"
    )


def _parsed(url: str, base: httpx2.URL | None = None) -> httpx2.URL:
    try:
        result = base.join(url) if base else httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise PreprocessError(f"{shown(url)!r} is no URL: {error}") from error
    label = shown(url if is_url(url) else str(result))
    if result.scheme not in ("http", "https") or not result.host:
        raise PreprocessError(f"{label!r} is refused: only http:// and https:// URLs are fetched")
    if result.port is not None and not 0 < result.port < 2**16:
        raise PreprocessError(f"{label!r} is no URL: there is no port {result.port}")
    if result.userinfo:
        raise PreprocessError(f"{label} is given with a password, which would be kept in files; leave it out")
    return result


def _request(url: httpx2.URL, rules: _Rules) -> Download | str:
    """The content of `url`, or where it leads."""
    limits = rules.limits
    deadline = Deadline(limits.wait_s, limits.wait_s)
    target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    try:
        with (
            httpcore2.ConnectionPool(network_backend=Backend(deadline, private=rules.private)) as pool,
            pool.stream("GET", target, headers=[(b"Host", url.netloc), *_HEADERS]) as response,
        ):
            headers = {name.lower(): value for name, value in cast("_Headers", response.headers)}
            if response.status in _REDIRECTS and b"location" in headers:
                return headers[b"location"].decode("latin-1")
            _check_status(url, response.status, headers)
            deadline.move(limits.download_s)
            size = _declared(url, headers, limits)
            return Download(_stored(url, response.iter_stream(), size, rules), _name(url))
    except PrivateAddressError as error:
        raise PreprocessError(f"{shown(str(url))} is refused: {error}") from error
    except _TROUBLE as error:
        if "certificate" in str(error).lower():
            raise PreprocessError(f"{shown(str(url))} is refused: its certificate is not trusted: {error}") from error
        raise _AgainError(_trouble(error, limits)) from error
    except (httpcore2.ProtocolError, httpcore2.UnsupportedProtocol) as error:
        raise PreprocessError(f"{shown(str(url))} cannot be downloaded: {error}") from error


def _trouble(error: Exception, limits: Limits) -> str:
    if isinstance(error, httpcore2.TimeoutException):
        return (
            f"the server did not answer within {limits.wait_s:g} s (data.limits.wait_s), or took more than "
            f"{limits.download_s:g} s in all (data.limits.download_s)"
        )
    return str(error) or "the connection broke off"


def _check_status(url: httpx2.URL, status: int, headers: dict[bytes, bytes]) -> None:
    if status in _TRY_AGAIN:
        after = headers.get(b"retry-after", b"")
        raise _AgainError(f"the server answers {status}", float(after) if after.isdigit() and len(after) < 6 else 0.0)
    if status != 200:
        why = {401: ": it wants a password", 403: ": it is not public", 404: ": it is not there"}.get(status, "")
        raise PreprocessError(f"{shown(str(url))} cannot be downloaded: the server answers {status}{why}")


def _declared(url: httpx2.URL, headers: dict[bytes, bytes], limits: Limits) -> int | None:
    text = headers.get(b"content-length", b"")
    size = int(text) if text.isdigit() else None
    if size is not None and size > limits.total_bytes:
        raise PreprocessError(
            f"{shown(str(url))} is refused: it has {size} bytes, and {limits.total_bytes} are allowed "
            "(data.limits.total_bytes)"
        )
    return size


def _stored(url: httpx2.URL, body: Iterator[bytes] | Iterable[bytes], size: int | None, rules: _Rules) -> IO[bytes]:
    limits = rules.limits
    if rules.scratch:
        rules.scratch.mkdir(parents=True, exist_ok=True)
    file = cast("IO[bytes]", tempfile.TemporaryFile(dir=rules.scratch))  # noqa: SIM115 - the caller closes it
    start, total, keep = time.monotonic(), 0, False
    try:
        for chunk in body:
            total += len(chunk)
            if total > limits.total_bytes:
                raise PreprocessError(
                    f"{shown(str(url))} is refused: it has more than {limits.total_bytes} bytes "
                    "(data.limits.total_bytes)"
                )
            took = time.monotonic() - start
            if took > limits.wait_s and total < took * limits.slowest:
                raise _AgainError(
                    f"it sent {total} bytes in {took:.0f} s, and {limits.slowest} a second are expected "
                    "(data.limits.slowest)"
                )
            file.write(chunk)
        if not total or (size is not None and total != size):
            raise _AgainError(f"it sent {total} bytes" + (f" of {size}" if size else ""))
        keep = True
    finally:
        if not keep:
            file.close()
    return file


def _name(url: httpx2.URL) -> str:
    name = PurePosixPath(unquote(url.path)).name
    return re.sub(r"[^\w .()+-]", "_", name)[-100:] or "picture"
