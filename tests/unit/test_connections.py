from __future__ import annotations

import asyncio
import select
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import structlog

from harness.patience import patient
from peercredd import server as server_module
from peercredd.access import Refusals, Refused
from peercredd.connections import MAX_CONNECTIONS_PER_USER, MOST_UNHEARD, Connections, Owner, Peer
from peercredd.server import _close_too_much

ALICE, ROOT = 1000, 0
LOOK_SECONDS = patient(10)
TOO_MUCH = bytes(MOST_UNHEARD + 1)


class Server:
    """A port of this process, the connections to it, and whose they are."""

    def __init__(self, undo: ExitStack) -> None:
        self._undo = undo
        self._listener = undo.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.owners: dict[int, Owner] = {}
        """By the client's port; of others there is no record."""
        self.connections = Connections(
            self._listener.getsockname()[1], lambda peer: self.owners.get(peer.port)
        )

    def connect(self, uid: int | None, *, since: int = 0) -> socket.socket:
        """The client's end of a new connection."""
        client = self._undo.enter_context(socket.create_connection(self._listener.getsockname()))
        accepted, _ = self._listener.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._undo.enter_context(accepted)
        if uid is not None:
            self.owners[client.getsockname()[1]] = Owner(uid, uid == ROOT, since)
        return client

    def hear(self, client: socket.socket) -> None:
        self.connections.heard("ipv4:{}:{}".format(*client.getsockname()))

    def look(self, *, short_of_memory: bool = False) -> dict[tuple[Refused, int | None], int]:
        return dict(+self.connections.close_too_much(short_of_memory=short_of_memory))


@pytest.fixture
def server() -> Iterator[Server]:
    with ExitStack() as undo:
        yield Server(undo)


def is_closed(client: socket.socket) -> bool:
    return bool(select.select([client], [], [], 0)[0]) and client.recv(1) == b""


def test_what_a_user_has_too_much_of_is_closed_the_newest_first(server: Server) -> None:
    others = [server.connect(ROOT) for _ in range(MAX_CONNECTIONS_PER_USER + 1)]
    newest = server.connect(ALICE, since=1000)
    of_alice = [server.connect(ALICE, since=number) for number in range(MAX_CONNECTIONS_PER_USER)]

    assert server.look() == {(Refused.TOO_MANY_CONNECTIONS, ALICE): 1}
    assert is_closed(newest)
    assert not any(map(is_closed, [*of_alice, *others]))


def test_of_whom_there_is_no_record_count_together(server: Server) -> None:
    for _ in range(MAX_CONNECTIONS_PER_USER + 2):
        server.connect(None)

    assert server.look() == {(Refused.TOO_MANY_CONNECTIONS, None): 2}


@pytest.mark.parametrize("uid", [ALICE, ROOT, None])
def test_short_of_memory_what_began_no_call_is_closed_whoever_sent_it(
    server: Server, uid: int | None
) -> None:
    flood, idle, caller = server.connect(uid), server.connect(ALICE), server.connect(ALICE)
    for sock in (flood, caller):
        sock.sendall(TOO_MUCH)
    server.hear(caller)

    assert server.look() == {}
    server.hear(caller)
    assert server.look(short_of_memory=True) == {(Refused.TOO_MUCH_SENT, uid): 1}
    assert is_closed(flood)
    assert not is_closed(idle)
    assert not is_closed(caller)


def test_a_call_is_no_pardon_for_what_came_after_it(server: Server) -> None:
    flood = server.connect(ALICE)
    server.look()
    server.hear(flood)
    flood.sendall(TOO_MUCH)

    assert server.look(short_of_memory=True) == {}
    # Another call might have come, and wait while the server has much to do.
    assert server.look(short_of_memory=True) == {}
    assert server.look(short_of_memory=True) == {(Refused.TOO_MUCH_SENT, ALICE): 1}


def test_what_was_accounted_for_before_is_not_held_against_anybody(server: Server) -> None:
    caller = server.connect(ALICE)
    for _ in range(3):
        caller.sendall(TOO_MUCH)
        server.hear(caller)
        server.look()
    server.hear(caller)
    server.look()

    assert server.look(short_of_memory=True) == {}


def test_another_connection_under_the_same_descriptor_stays_open(
    server: Server,
) -> None:
    gone, other = server.connect(ALICE), server.connect(ALICE)
    (found,) = (each for each in server.connections._open() if each.peer.port == port(gone))
    (stays,) = (each for each in server.connections._open() if each.peer.port == port(other))

    assert not server.connections._close(found._replace(descriptor=stays.descriptor))
    assert not is_closed(other)


def test_peers_are_read_as_grpc_writes_them() -> None:
    assert Peer.of("ipv4:127.0.0.1:50000") == ("127.0.0.1", 50000)
    assert Peer.of("ipv6:%5B::1%5D:50000") == ("::1", 50000)


def port(client: socket.socket) -> int:
    return int(client.getsockname()[1])


def test_a_look_that_fails_is_logged_and_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bool] = []

    class Failing(Connections):
        def close_too_much(self, *, short_of_memory: bool) -> Counter[tuple[Refused, int | None]]:
            looks.append(short_of_memory)
            if len(looks) == 1:
                raise RuntimeError("can't start new thread")
            return Counter({(Refused.TOO_MANY_CONNECTIONS, ALICE): len(looks)})

    async def look_until_something_is_counted(refusals: Refusals) -> None:
        task = asyncio.create_task(_close_too_much(Failing(1, lambda _: None), refusals))
        async with asyncio.timeout(LOOK_SECONDS):
            while not refusals.counts:
                await asyncio.sleep(0)
        task.cancel()

    monkeypatch.setattr(server_module, "CLOSE_SECONDS", 0)
    refusals = Refusals()
    with structlog.testing.capture_logs() as logged:
        asyncio.run(look_until_something_is_counted(refusals))
    assert refusals.counts[Refused.TOO_MANY_CONNECTIONS] >= 2
    (entry,) = logged
    assert (entry["log_level"], entry["reason"]) == ("warning", "can't start new thread")
