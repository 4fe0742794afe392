"""What a caller asks with, checked and made binary: ConnectionKey messages to keys."""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_pton
from typing import NamedTuple

from peercred.v1 import peer_credentials_pb2 as pb
from peercredd.records import V4_MAPPED

_UNSPECIFIED = (bytes(16), V4_MAPPED + bytes(4))
_BROADCAST = V4_MAPPED + b"\xff\xff\xff\xff"
_QUOTED_CHARACTERS = 64


class InvalidKey(ValueError):  # noqa: N818 - named like the status it becomes
    """A key that cannot name a connection.

    `field` is the path of the wrong field within the ConnectionKey, such as
    ``local.address``, or ``""`` where the key as a whole is wrong; `reason` is
    the ErrorInfo reason.
    """

    def __init__(self, field: str, text: str, reason: str = "INVALID_KEY") -> None:
        super().__init__(text)
        self.field = field
        self.text = text
        self.reason = reason


class Endpoints(NamedTuple):
    """Both ends as the asking end sees them: 16-byte addresses, ports in host byte order."""

    local: bytes
    local_port: int
    remote: bytes
    remote_port: int


class Key(NamedTuple):
    """A valid ConnectionKey: `socket_cookie`, or `endpoints`, or both are there."""

    socket_cookie: int | None
    netns_cookie: int | None
    endpoints: Endpoints | None


def parse(message: pb.ConnectionKey) -> Key:
    """Return the binary key.

    IPv4 addresses become v4-mapped, zones are dropped. Raises `InvalidKey`.
    """
    cookie = netns_cookie = endpoints = None
    if message.HasField("socket_cookie"):
        cookie = message.socket_cookie
        if not cookie:
            raise InvalidKey("socket_cookie", "0 is no socket's cookie, send what SO_COOKIE gives")
    if message.HasField("netns_cookie"):
        netns_cookie = message.netns_cookie
        if not netns_cookie:
            raise InvalidKey(
                "netns_cookie", "0 is no namespace's cookie, send what SO_NETNS_COOKIE gives"
            )
    if message.HasField("local"):
        if not message.HasField("remote"):
            raise InvalidKey("remote", "missing, a tuple needs both local and remote")
        local, local_port = _endpoint(message.local, "local")
        remote, remote_port = _endpoint(message.remote, "remote")
        if local.startswith(V4_MAPPED) != remote.startswith(V4_MAPPED):
            raise InvalidKey(
                "remote.address",
                "local and remote are of two families, no connection has one end in each",
            )
        endpoints = Endpoints(local, local_port, remote, remote_port)
    elif message.HasField("remote"):
        raise InvalidKey("local", "missing, a tuple needs both local and remote")
    elif cookie is None:
        raise InvalidKey("", "needs socket_cookie, or both local and remote")
    return Key(cookie, netns_cookie, endpoints)


def _endpoint(endpoint: pb.Endpoint, field: str) -> tuple[bytes, int]:
    text = endpoint.address
    try:
        if ":" in text:
            text, percent, zone = text.partition("%")
            if percent and not zone:
                raise ValueError
            address = inet_pton(AF_INET6, text)
        else:
            address = V4_MAPPED + inet_pton(AF_INET, text)
    except (OSError, ValueError):
        quoted = repr(endpoint.address[:_QUOTED_CHARACTERS])
        raise InvalidKey(f"{field}.address", f"{quoted} is not an IPv4 or IPv6 address") from None
    if address in _UNSPECIFIED:
        raise InvalidKey(f"{field}.address", f"{text} is not the address of a connection's end")
    if address == _BROADCAST or _is_multicast(address):
        raise InvalidKey(f"{field}.address", f"{text} is multicast or broadcast, never TCP")
    port = endpoint.port
    if not 0 < port < 65536:
        raise InvalidKey(f"{field}.port", f"{port} is not between 1 and 65535")
    return address, port


def _is_multicast(address: bytes) -> bool:
    if address.startswith(V4_MAPPED):
        return address[12] >> 4 == 0xE
    return address[0] == 0xFF
