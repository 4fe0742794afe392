"""Who calls on loopback TCP, as the daemon's own table knows it, and how much at once.

Each call's connection is looked up by its tuple, with the daemon at the server's end. That
is sound here, though a tuple alone names the newest connection only: while the daemon's socket
can still send, it has that tuple to itself in its network namespace, and the kernel lets no other
connection be born with it. A caller that has reset its connection so that another may take
the tuple is perhaps taken for that other one, and gets nothing: the answer goes to the
socket that was reset. So who calls is not remembered from one call to the next, only whose each
of the daemon's sockets is; and what a call was admitted as it stays until its end.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from contextvars import ContextVar
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any, Final, NamedTuple, TypeAlias
from weakref import WeakValueDictionary, ref

import grpc.aio
from google.rpc import code_pb2

from peercredd import encode, records
from peercredd.access import Caller, OwnView, Policy, Refusals, Refused
from peercredd.connections import Connections, Owner, Peer
from peercredd.records import V4_MAPPED
from peercredd.service import PeerCredentialsService, RequestError
from peercredd.store import Answer, Reason, Store

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"

MAX_CALLS_PER_USER: Final = 64
"""Under way at the same time, of users who do not see all, besides `server.MAX_CALLS_UNSEEN`. With
a request of 256 KB in each a user makes the daemon hold 32 MB."""

MAX_LISTS_PER_USER: Final = 2
"""Of these, ListConnections and WatchConnections: each reads every record there is."""

MOST_REMEMBERED: Final = 256
"""Connections of callers: half a megabyte."""

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


class _Remembered(NamedTuple):
    """Whose a connection is."""

    key: bytes
    """Its tuple."""
    server: bytes
    """The cookie of the daemon's socket, which no other one ever has (sock_gen_cookie())."""
    service: PeerCredentialsService
    calls: tuple[_UnderWay, ...]
    """What a call over it counts as; nothing if its user sees all."""
    lists: tuple[_UnderWay, ...]


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
        self.connections = Connections(port, self._owner)
        self._policy = policy
        self._refusals = refusals
        self._service = service
        self._calls: WeakValueDictionary[int, _UnderWay] = WeakValueDictionary()
        self._lists: WeakValueDictionary[int, _UnderWay] = WeakValueDictionary()
        self._remembered: dict[str, _Remembered] = {}

    def begin(self, context: Context, lists: bool) -> PeerCredentialsService:
        """Return what answers a call.

        It is under way until gRPC's task of it is done, with the answer written: who does not read
        makes that wait, long after the answer was made. To be called in that task.

        Args:
            context: of the call.
            lists: whether it is a ListConnections or a WatchConnections.

        Raises:
            RequestError: the caller is not known, or has as many calls under way as one may have.
        """
        peer = context.peer()
        self.connections.heard(peer)
        remembered = self._remembered.get(peer)
        # The table is asked for each call; but a socket's record always names the same client.
        if remembered is None or self.store.newest(remembered.key) != remembered.server:
            remembered = self._remember(peer)
        kinds = remembered.lists if lists else remembered.calls
        if kinds:
            for kind in kinds:
                if kind.is_full():
                    raise kind.one_too_many()
            task = asyncio.current_task()
            assert task
            call = ref(task)
            for kind in kinds:
                kind.add(call)
            _counted_as.set(kinds)
        return remembered.service

    def _unknown(self, peer: str, *, is_tcp: bool) -> RequestError:
        self._refusals.count(Refused.CALLER_UNKNOWN, None)
        absent = self._connection(*Peer.of(peer)) if is_tcp else Reason.NEVER_SEEN
        reason = absent if isinstance(absent, Reason) else Reason.NEVER_SEEN
        return RequestError(
            encode.error(
                code_pb2.UNAUTHENTICATED,
                Refused.CALLER_UNKNOWN.value,
                f"peercredd does not know who you are: {_MENDS[reason]}",
            )
        )

    def knows(self, host: str, port: int) -> bool:
        """Whether there is a record of a connection from that end to this port."""
        return isinstance(self._connection(host, port), Answer)

    def _tuple_of(self, peer: str) -> bytes | None:
        """The tuple of a call's connection; None if it is none over TCP."""
        if not peer.startswith(("ipv4:", "ipv6:")):
            return None
        host, port = Peer.of(peer)
        here, there = _addresses(host)
        return records.TUPLE.pack(self.store.own_netns_cookie, there, here, port, self.port)

    def _remember(self, peer: str) -> _Remembered:
        """Look up whose a connection is. Raises RequestError if that is not known."""
        self._remembered.pop(peer, None)
        key = self._tuple_of(peer)
        server = self.store.newest(key) if key else None
        record = self.store.record(server, key) if server and key else None
        if not (key and server and record):
            raise self._unknown(peer, is_tcp=key is not None)
        _, cookie, _, _ = records.CONNECTION_HEAD.unpack_from(record)
        caller = records.credentials(record, records.CLIENT_OFFSET)
        access = self._policy.access(caller)
        if access.sees_all:
            remembered = _Remembered(key, server, self._service(self.store, access), (), ())
        else:
            view = OwnView(
                self.store,
                Caller(caller.euid, cookie),
                self._refusals,
                listener_details=access.listener_details,
            )
            calls, lists = self._under_way(caller.euid)
            remembered = _Remembered(
                key, server, self._service(view, access), (calls,), (calls, lists)
            )
        if len(self._remembered) >= MOST_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[peer] = remembered
        return remembered

    def _under_way(self, uid: int) -> tuple[_UnderWay, _UnderWay]:
        """A user's calls, and its lists among them; for all of its connections the same."""
        refuse = functools.partial(self._refusals.count, Refused.TOO_MANY_CALLS, uid)
        return (
            self._calls.setdefault(uid, _UnderWay(MAX_CALLS_PER_USER, "calls", refuse)),
            self._lists.setdefault(uid, _UnderWay(MAX_LISTS_PER_USER, "lists or watches", refuse)),
        )

    def _owner(self, peer: Peer) -> Owner | None:
        found = self._connection(*peer)
        if not isinstance(found, Answer):
            return None
        sees_all = self._policy.access(found.peer).sees_all
        return Owner(found.peer.euid, sees_all, found.established_time_ns)

    def _connection(self, host: str, port: int) -> Answer | Reason:
        here, there = _addresses(host)
        return self.store.find_by_tuple(self.store.own_netns_cookie, here, self.port, there, port)


class _UnderWay:
    """The calls of one kind that one user has under way.

    Their tasks are looked at when it matters. To be told of each one's end would cost a call more:
    what a context of gRPC's calls back then is a cycle, which waits for the garbage collector.
    """

    def __init__(self, most: int, what: str, refuse: Callable[[], None]) -> None:
        self._most = most
        self._what = what
        self._refuse = refuse
        self._calls: list[ref[asyncio.Task[Any]]] = []
        """Some may be over."""

    def is_full(self) -> bool:
        """Whether there are as many as there may be."""
        if len(self._calls) >= self._most:
            self._calls = [call for call in self._calls if not _is_over(call)]
        return len(self._calls) >= self._most

    def add(self, call: ref[asyncio.Task[Any]]) -> None:
        """Count one more, until its task is done."""
        self._calls.append(call)

    def one_too_many(self) -> RequestError:
        """Count the refusal of one more; the error to raise."""
        self._refuse()
        return RequestError(
            encode.error(
                code_pb2.RESOURCE_EXHAUSTED,
                Refused.TOO_MANY_CALLS.value,
                f"you have {self._most} {self._what} under way, as many as one user may have; "
                "end some, or ask again later",
            )
        )


_counted_as: ContextVar[tuple[_UnderWay, ...]] = ContextVar("_counted_as")
"""By a call's task, so that its user's count is the same one for as long as it has any."""


def _is_over(call: ref[asyncio.Task[Any]]) -> bool:
    task = call()
    return task is None or task.done()


def _addresses(host: str) -> tuple[bytes, bytes]:
    """The daemon's own address in a connection of that client, and the client's: 16 bytes each."""
    # What is listened on is bound to one address each: a connection's family says which.
    if ":" in host:
        return _LOOPBACK_V6, inet_pton(AF_INET6, host)
    return _LOOPBACK_V4, V4_MAPPED + inet_pton(AF_INET, host)
