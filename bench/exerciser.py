"""A user who connects, asks everything in every way, checks each answer, and closes."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import grpc

from bench.callers import key
from bench.child import Child, answer, orders
from bench.crowd import Question, cookie, question
from bench.modest import OWN_CONNECTION, RESET
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as pb_grpc

CONNECTIONS = 20
"""That are made in one round, asked about, and closed."""

CALL_SECONDS = 30.0
TOLD_SECONDS = 30.0
"""Until what a watcher was not told counts as wrong."""

BY_SOCKET, BY_TUPLE, CLIENTS_END = "Lookup, by socket", "Lookup, by tuple", "Lookup, client's end"
BATCH, STREAM = "BatchLookup, keys", "LookupStream, keys"
LIST, WATCH = "ListConnections, calls", "WatchConnections, connections"
CLOSED, OTHERS = "Lookup, of a closed one", "Lookup, of another user's"
WHO = "WhoAmI"
KINDS = (BY_SOCKET, BY_TUPLE, CLIENTS_END, BATCH, STREAM, LIST, WATCH, CLOSED, OTHERS, WHO)


Peer = tuple[int, int]
"""Uid and pid."""


class Outcomes(NamedTuple):
    """Answers of one kind."""

    right: int
    wrong: int
    failed: int
    """Calls that had no answer."""


class Exerciser(Child):
    """The process. `other` is a connection of another user that stays open."""

    def __init__(self, address: str, uid: int, other: Question) -> None:
        super().__init__("bench.exerciser", address, uid)
        self.tell(other)

    def start(self, seconds: float) -> None:
        """Begin."""
        self.tell(seconds)

    def finish(self) -> dict[str, Outcomes]:
        """Wait for the end of it; returns what came of it by kind."""
        return {kind: Outcomes(*outcomes) for kind, outcomes in self.hear().items()}


class _Connection(NamedTuple):
    accepted: Question
    client_cookie: int


class _Watcher:
    """What the daemon tells of connections to one port."""

    def __init__(self, address: str, port: int) -> None:
        self._established: set[int] = set()
        self._retired: set[int] = set()
        self._missed = 0
        self._news = threading.Condition()
        self._channel = grpc.insecure_channel(address, options=OWN_CONNECTION)
        stub = pb_grpc.PeerCredentialsStub(self._channel)
        self._responses = stub.WatchConnections(pb.WatchConnectionsRequest(server_port=port))
        while not next(self._responses).synchronized:
            pass
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def told(self, cookies: Iterable[int]) -> int:
        """How many of them it was told of, from their beginning to their end, or has missed."""
        sought = set(cookies)

        def complete() -> bool:
            return self._missed > 0 or sought <= self._established & self._retired

        with self._news:
            self._news.wait_for(complete, TOLD_SECONDS)
            told = len(sought & self._established & self._retired) + self._missed
            self._established -= sought
            self._retired -= sought
            self._missed = 0
        return min(told, len(sought))

    def close(self) -> None:
        self._responses.cancel()
        self._thread.join()
        self._channel.close()

    def _read(self) -> None:
        missed = 0
        try:
            for response in self._responses:
                with self._news:
                    self._missed += response.missed - missed
                    missed = response.missed
                    for event in response.events:
                        if event.HasField("established"):
                            self._established.add(event.established.server_socket_cookie)
                        elif event.HasField("retired"):
                            self._retired.add(event.retired.server_socket_cookie)
                    self._news.notify_all()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                raise


class _Exercise:
    def __init__(self, address: str, other: Question) -> None:
        self._address = address
        self._other = other
        self._uid = os.geteuid()
        self._own = (self._uid, os.getpid())
        self.outcomes = {kind: [0, 0, 0] for kind in KINDS}

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with socket.create_server(("127.0.0.1", 0)) as listener:
            watcher = _Watcher(self._address, listener.getsockname()[1])
            try:
                while time.monotonic() < end:
                    # Another connection to the daemon each time.
                    with grpc.insecure_channel(self._address, options=OWN_CONNECTION) as channel:
                        self._round(pb_grpc.PeerCredentialsStub(channel), listener, watcher)
            finally:
                watcher.close()

    def _round(
        self, stub: pb_grpc.PeerCredentialsStub, listener: socket.socket, watcher: _Watcher
    ) -> None:
        with ExitStack() as opened:
            made = [_connect(listener, opened) for _ in range(CONNECTIONS)]
            keys = [key(each.accepted) for each in made]
            cookies = {each.accepted.cookie for each in made}
            port = listener.getsockname()[1]
            tuples = [pb.ConnectionKey(local=each.local, remote=each.remote) for each in keys]
            clients = [pb.ConnectionKey(socket_cookie=each.client_cookie) for each in made]
            for kind, asked in ((BY_SOCKET, keys), (BY_TUPLE, tuples), (CLIENTS_END, clients)):
                for each in asked:
                    self._count(kind, 1, partial(_names, stub, each, self._own))
            self._count(BATCH, len(keys), lambda: _batch(stub, keys).count(self._own))
            self._count(STREAM, len(keys), lambda: _stream(stub, keys).count(self._own))
            self._count(LIST, 1, lambda: _listed(stub, port) == cookies)
            others = (self._other.uid, self._other.pid) if self._uid == 0 else None
            self._count(OTHERS, 1, partial(_names, stub, key(self._other), others))
            self._count(WHO, 1, lambda: _who(stub) in (self._uid, None))
        for each in keys:
            self._count(CLOSED, 1, partial(_names, stub, each, None))
        self._count(WATCH, len(cookies), lambda: watcher.told(cookies))

    def _count(self, kind: str, number: int, right: Callable[[], int]) -> None:
        outcomes = self.outcomes[kind]
        try:
            answers = right()
        except grpc.RpcError as error:
            print(f"{kind}: {error}", file=sys.stderr)
            outcomes[2] += number
        else:
            outcomes[0] += answers
            outcomes[1] += number - answers


def _connect(listener: socket.socket, opened: ExitStack) -> _Connection:
    client = opened.enter_context(socket.create_connection(listener.getsockname()))
    accepted = opened.enter_context(listener.accept()[0])
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return _Connection(question(accepted, os.geteuid(), os.getpid()), cookie(client))


def _lookup(stub: pb_grpc.PeerCredentialsStub, asked: pb.ConnectionKey) -> Peer | None:
    try:
        return _peer(stub.Lookup(pb.LookupRequest(key=asked), timeout=CALL_SECONDS))
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return None
        raise


def _names(stub: pb_grpc.PeerCredentialsStub, asked: pb.ConnectionKey, peer: Peer | None) -> bool:
    return _lookup(stub, asked) == peer


def _batch(
    stub: pb_grpc.PeerCredentialsStub, asked: Sequence[pb.ConnectionKey]
) -> list[Peer | None]:
    response = stub.BatchLookup(pb.BatchLookupRequest(keys=asked), timeout=CALL_SECONDS)
    return [_peer(each.found) for each in response.results]


def _stream(
    stub: pb_grpc.PeerCredentialsStub, asked: Sequence[pb.ConnectionKey]
) -> list[Peer | None]:
    requests = (pb.LookupStreamRequest(key=each) for each in asked)
    responses = stub.LookupStream(requests, timeout=CALL_SECONDS)
    return [_peer(each.result.found) for each in responses]


def _listed(stub: pb_grpc.PeerCredentialsStub, port: int) -> set[int]:
    request = pb.ListConnectionsRequest(server_port=port)
    pages = stub.ListConnections(request, timeout=CALL_SECONDS)
    return {each.server_socket_cookie for page in pages for each in page.connections}


def _who(stub: pb_grpc.PeerCredentialsStub) -> int | None:
    response = stub.WhoAmI(pb.WhoAmIRequest(), timeout=CALL_SECONDS)
    # On the unix socket nobody is told.
    return response.caller.uid if response.HasField("caller") else None


def _peer(response: pb.LookupResponse) -> Peer:
    return response.peer.uid, response.peer.pid


def _obey(address: str, uid: int) -> None:
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    told = orders()
    local, remote, *rest = next(told)
    exercise = _Exercise(address, Question(tuple(local), tuple(remote), *rest))
    for seconds in told:
        exercise.run(seconds)
        answer(exercise.outcomes)


if __name__ == "__main__":
    _obey(sys.argv[1], int(sys.argv[2]))
