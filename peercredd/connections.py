"""The connections that callers on loopback TCP have open, and which of them are closed.

gRPC lets nobody look at a connection when it comes, and says of none what it keeps for it. So all
are looked at again and again, as descriptors of this process. What is shut down here gRPC finds
closed as if its client had.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from socket import (
    AF_INET,
    AF_INET6,
    IPPROTO_TCP,
    SHUT_RDWR,
    SOL_SOCKET,
    TCP_INFO,
    socket,
)
from typing import Final, NamedTuple
from urllib.parse import unquote

from peercredd.access import Refused

MAX_CONNECTIONS_PER_USER: Final = 64
"""Of users who do not see all: 20 KB each while idle. So many too are allowed to all together of
whom there is no record."""

MOST_UNHEARD: Final = 16 * 1024
"""Bytes of one connection that began no call, and were no message of one. They can be frames that
HTTP/2 wants besides; or headers that do not end, of which gRPC makes sixty times as much."""

_SO_COOKIE: Final = 57
_BYTES_RECEIVED: Final = 128
"""Offset of tcpi_bytes_received in struct tcp_info of linux/tcp.h."""


class Peer(NamedTuple):
    """Address, as text, and port of a client."""

    host: str
    port: int

    @classmethod
    def of(cls, name: str) -> Peer:
        """Out of gRPC's "ipv4:127.0.0.1:50000" or "ipv6:%5B::1%5D:50000"."""
        _, _, endpoint = unquote(name).partition(":")
        host, _, port = endpoint.rpartition(":")
        return cls(host.strip("[]"), int(port))


class Owner(NamedTuple):
    """Whose a connection is."""

    uid: int
    sees_all: bool
    established_time_ns: int
    """Since boot."""


class _Open(NamedTuple):
    """A connection of this process."""

    cookie: int
    descriptor: int
    peer: Peer
    received: int
    """Bytes, since it was made."""


class _Seen(NamedTuple):
    """What was found of a connection the last time."""

    owner: Owner | None
    received: int
    accounted: int
    """How many of these were received when something was last heard over it, or fewer."""
    heard: bool
    """Whether something was, since the look before."""


class Connections:
    """Those to one port of this process."""

    def __init__(self, port: int, owner: Callable[[Peer], Owner | None]) -> None:
        self._port = port
        self._owner = owner
        self._heard: set[str] = set()
        self._seen: dict[int, _Seen] = {}

    def heard(self, peer: str) -> None:
        """Note that a call has begun, or that a message of one has come.

        Args:
            peer: who is at the other end, as gRPC has it.
        """
        self._heard.add(peer)

    def close_too_much(self, *, short_of_memory: bool) -> Counter[tuple[Refused, int | None]]:
        """Close what a user has beyond MAX_CONNECTIONS_PER_USER, the newest first.

        While this process is `short_of_memory`, close those too over which MOST_UNHEARD has come
        since anything was heard, and nothing since the look before the last: until headers end,
        nothing else can be sent on their connection (RFC 9113, 6.10). To be called again and again;
        may run in a thread.

        Returns:
            How many were closed, by reason and user; None for all of whom there is no record.
        """
        heard, self._heard = self._heard, set()
        # A copy, made at once: a call that begins now may still be noted in it.
        heard_from = {Peer.of(name) for name in tuple(heard)}
        seen: dict[int, _Seen] = {}
        by_user: dict[int | None, list[tuple[int, _Open]]] = {}
        closed: Counter[tuple[Refused, int | None]] = Counter()
        for each in self._open():
            owner, received, accounted, was_heard = self._seen.get(
                each.cookie, _Seen(None, 0, 0, False)
            )
            is_heard = each.peer in heard_from
            owner = owner or self._owner(each.peer)
            uid = owner.uid if owner else None
            if is_heard:
                # Of what has come since the last look nobody knows whether it was before or after.
                accounted = received
            elif (
                short_of_memory
                # Its calls wait while the server is busy with what others send.
                and not was_heard
                and each.received - accounted > MOST_UNHEARD
            ):
                closed[Refused.TOO_MUCH_SENT, uid] += self._close(each)
                continue
            seen[each.cookie] = _Seen(owner, each.received, accounted, is_heard)
            if not (owner and owner.sees_all):
                since = owner.established_time_ns if owner else 0
                by_user.setdefault(uid, []).append((since, each))
        self._seen = seen
        for uid, of_user in by_user.items():
            for _, each in sorted(of_user)[MAX_CONNECTIONS_PER_USER:]:
                closed[Refused.TOO_MANY_CONNECTIONS, uid] += self._close(each)
        return closed

    def _open(self) -> Iterator[_Open]:
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - there may be thousands
            descriptor = int(name)
            with suppress(OSError), _duplicate(descriptor) as connection:
                if (
                    connection.family in (AF_INET, AF_INET6)
                    and connection.getsockname()[1] == self._port
                ):
                    host, port = connection.getpeername()[:2]  # one that listens has none
                    peer = Peer(host.removeprefix("::ffff:"), port)
                    info = connection.getsockopt(IPPROTO_TCP, TCP_INFO, _BYTES_RECEIVED + 8)
                    (received,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED)
                    yield _Open(_cookie(connection), descriptor, peer, received)

    def _close(self, which: _Open) -> bool:
        """Shut a connection down; false if it has gone already."""
        with suppress(OSError), _duplicate(which.descriptor) as connection:
            if _cookie(connection) == which.cookie:
                connection.shutdown(SHUT_RDWR)
                return True
        return False


@contextmanager
def _duplicate(descriptor: int) -> Iterator[socket]:
    """A socket of this process, which stays the same whatever gRPC closes meanwhile.

    Raises:
        OSError: it is no socket, or not open any more.
    """
    duplicate = os.dup(descriptor)
    try:
        connection = socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise
    with connection:
        yield connection


def _cookie(connection: socket) -> int:
    return int.from_bytes(connection.getsockopt(SOL_SOCKET, _SO_COOKIE, 8), "little")
