"""Connections that go only where they may, and end when their time is up.

A name is resolved here, its addresses are judged, and the connection is made to those very addresses: a name that
means another address a moment later (DNS rebinding) gains nothing. TLS still checks the certificate of the name.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable
from typing import Any

import httpcore2
from httpcore2 import NetworkStream

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses in the clothes of IPv6, after RFC 6052


class PrivateAddressError(ValueError):
    """A host that lies inside a private network, or in no network at all."""


class Deadline:
    """A moment after which nothing may be waited for. It can be moved."""

    def __init__(self, seconds: float, each: float) -> None:
        self.each = each  # seconds that one wait may take
        self.move(seconds)

    def move(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that the next wait may take.

        Raises:
            httpcore2.ReadTimeout: none are left.
        """
        left = min(self._end - time.monotonic(), self.each)
        if left <= 0:
            raise httpcore2.ReadTimeout("its time is up")
        return left


class Backend(httpcore2.NetworkBackend):
    """TCP to public addresses, or to all with `private`."""

    def __init__(self, deadline: Deadline, *, private: bool) -> None:
        self._tcp = httpcore2.SyncBackend()
        self._deadline = deadline
        self._private = private

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> NetworkStream:
        failure: Exception = httpcore2.ConnectError(f"{host} has no address")
        for address in addresses(host, port, private=self._private):
            try:
                stream = self._tcp.connect_tcp(address, port, self._deadline.left(), local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return _Timed(stream, self._deadline)
        raise failure


def addresses(host: str, port: int, *, private: bool) -> list[str]:
    """What `host` resolves to.

    Raises:
        PrivateAddressError: one of them is not public, and `private` is off.
        httpcore2.ConnectError: the name cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpcore2.ConnectError(f"the name {host} cannot be resolved") from error
    result = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
    for address in result:
        if not private and not public(address):
            raise PrivateAddressError(
                f"{host} is at {address}, inside a private network; data.private_urls allows such addresses"
            )
    return result


def public(address: str) -> bool:
    """Whether anybody on the internet could reach it, also where IPv6 wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Timed(NetworkStream):
    """A stream whose every wait ends with the deadline."""

    def __init__(self, stream: NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> NetworkStream:
        return _Timed(self._stream.start_tls(ssl_context, server_hostname, self._deadline.left()), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
