"""Who calls on loopback TCP, as the daemon's own table knows it, and how much at once.

Each call's connection is looked up by its tuple, with the daemon at the server's end. That
is sound here, though a tuple alone names the newest connection only: while the daemon's socket
can still send, it has that tuple to itself in its network namespace, and the kernel lets no other
connection be born with it. A caller that has reset its connection so that another may take
the tuple is perhaps taken for that other one, and gets nothing: the answer goes to the
socket that was reset. So nothing is remembered from one call to the next, and what a call
was admitted as it stays until its end.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from socket import AF_INET, AF_INET6, SHUT_RDWR, inet_pton, socket
from typing import Final, NamedTuple
from urllib.parse import unquote

from google.rpc import code_pb2

from peercredd import encode
from peercredd.access import Caller, OwnView, Policy, Refusals, Refused
from peercredd.records import V4_MAPPED
from peercredd.service import PeerCredentialsService, RequestError
from peercredd.store import Answer, Reason, Store

MAX_CALLS_PER_USER: Final = 64
"""Under way at the same time, of users who do not see all. With a request of 256 KB in each a user
makes the daemon hold 16 MB."""

MAX_LISTS_PER_USER: Final = 2
"""Of these, ListConnections and WatchConnections: each reads every record there is."""

MAX_CONNECTIONS_PER_USER: Final = 64
"""Of users who do not see all: 20 KB each while idle. So many too are allowed to all together of
whom there is no record."""

_LOOPBACK_V4: Final = V4_MAPPED + bytes([127, 0, 0, 1])
_LOOPBACK_V6: Final = bytes(15) + b"\1"

_MENDS: Final = {
    Reason.NEVER_SEEN: "your connect() was not recorded; ask from within the captured cgroup, or "
    "over the unix socket",
    Reason.OLDER_THAN_CAPTURE: "your connection is older than the capture; connect again",
    Reason.TABLE_WAS_FULL: "there was no room to record your connection; connect again later, or "
    "ask over the unix socket",
    Reason.RETIRED: "your connection has been closed; connect again",
}


class _Peer(NamedTuple):
    """Address, as text, and port of a client."""

    host: str
    port: int


class Callers:
    """Admits calls that come to a port on loopback, under a policy."""

    def __init__(
        self,
        store: Store,
        port: int,
        policy: Policy,
        refusals: Refusals,
        service: Callable[..., PeerCredentialsService],
    ) -> None:
        self.store = store
        self.port = port
        self._policy = policy
        self._refusals = refusals
        self._service = service
        self._calls: Counter[int] = Counter()
        self._lists: Counter[int] = Counter()

    @contextmanager
    def admitted(self, peer: str, *, lists: bool = False) -> Iterator[PeerCredentialsService]:
        """Yield what answers one call.

        Args:
            peer: of the call's connection, as gRPC writes it.
            lists: whether it is a ListConnections.

        Raises:
            RequestError: the caller is not known, or has too many calls under way.
        """
        caller = self.identify(peer)
        access = self._policy.access(caller.peer)
        if access.sees_all:
            yield self._service(self.store, access)
            return
        uid = caller.peer.euid
        view = OwnView(
            self.store,
            Caller(uid, caller.server_socket_cookie),
            self._refusals,
            listener_details=access.listener_details,
        )
        with self._counted(self._calls, uid, MAX_CALLS_PER_USER, "calls"):
            service = self._service(view, access)
            if not lists:
                yield service
                return
            with self._counted(self._lists, uid, MAX_LISTS_PER_USER, "calls of ListConnections"):
                yield service

    def identify(self, peer: str) -> Answer:
        """Find the connection of a call; raises RequestError where there is no record of it."""
        found = self._find(peer)
        if isinstance(found, Answer) and found.asker_is_server:
            return found
        self._refusals.count(Refused.CALLER_UNKNOWN, None)
        reason = found if isinstance(found, Reason) else Reason.NEVER_SEEN
        raise RequestError(
            encode.error(
                code_pb2.UNAUTHENTICATED,
                Refused.CALLER_UNKNOWN.value,
                f"peercredd does not know who you are: {_MENDS[reason]}",
            )
        )

    def close_surplus(self) -> Counter[int | None]:
        """Close what a user has beyond MAX_CONNECTIONS_PER_USER, the newest first.

        gRPC does not let anybody look at a connection when it comes. It finds these closed as
        if their clients had. May run in a thread of its own.

        Returns:
            How many were closed by user; None for all of whom there is no record.
        """
        surplus: dict[int | None, list[tuple[int, int, _Peer]]] = {}
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - there may be thousands
            if peer := self._peer(int(name)):
                found = self._connection(*peer)
                if not isinstance(found, Answer):
                    surplus.setdefault(None, []).append((0, int(name), peer))
                elif not self._policy.access(found.peer).sees_all:
                    of_user = surplus.setdefault(found.peer.euid, [])
                    of_user.append((found.established_time_ns, int(name), peer))
        closed: Counter[int | None] = Counter()
        for uid, of_user in surplus.items():
            of_user.sort()
            for _, descriptor, peer in of_user[MAX_CONNECTIONS_PER_USER:]:
                closed[uid] += self._peer(descriptor, to_be_closed=peer) == peer
        return closed

    def _peer(self, descriptor: int, to_be_closed: _Peer | None = None) -> _Peer | None:
        """Who is connected to the port over a descriptor of this process, if it is for that.

        A connection whose peer is the one `to_be_closed` is shut down.
        """
        with ExitStack() as opened, suppress(OSError):
            # A duplicate stays the same connection, whatever gRPC closes meanwhile.
            duplicate = os.dup(descriptor)
            opened.callback(os.close, duplicate)
            if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
                return None
            connection = socket(fileno=duplicate)
            opened.callback(connection.detach)
            if connection.family not in (AF_INET, AF_INET6):
                return None
            if connection.getsockname()[1] != self.port:
                return None
            host, port = connection.getpeername()[:2]  # one that listens has none
            peer = _Peer(host.removeprefix("::ffff:"), port)
            if peer == to_be_closed:
                connection.shutdown(SHUT_RDWR)
            return peer
        return None

    def knows(self, host: str, port: int) -> bool:
        """Whether there is a record of a connection from that end to this port."""
        return isinstance(self._connection(host, port), Answer)

    def _find(self, peer: str) -> Answer | Reason:
        # "ipv4:127.0.0.1:50000" or "ipv6:%5B::1%5D:50000".
        family, _, endpoint = unquote(peer).partition(":")
        host, _, port = endpoint.rpartition(":")
        if family not in ("ipv4", "ipv6"):
            return Reason.NEVER_SEEN
        return self._connection(host.strip("[]"), int(port))

    def _connection(self, host: str, port: int) -> Answer | Reason:
        # What is listened on is bound to one address each: a connection's family says which.
        if ":" in host:
            here, there = _LOOPBACK_V6, inet_pton(AF_INET6, host)
        else:
            here, there = _LOOPBACK_V4, V4_MAPPED + inet_pton(AF_INET, host)
        netns_cookie = self.store.own_netns_cookie
        return self.store.find_by_tuple(netns_cookie, here, self.port, there, port)

    @contextmanager
    def _counted(self, counter: Counter[int], uid: int, most: int, what: str) -> Iterator[None]:
        if counter[uid] >= most:
            self._refusals.count(Refused.TOO_MANY_CALLS, uid)
            raise RequestError(
                encode.error(
                    code_pb2.RESOURCE_EXHAUSTED,
                    Refused.TOO_MANY_CALLS.value,
                    f"you have {most} {what} under way, as many as one user may have; "
                    "end some, or ask again later",
                )
            )
        counter[uid] += 1
        try:
            yield
        finally:
            counter[uid] -= 1
            if not counter[uid]:
                del counter[uid]
