import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from harness import bpf_maps
from harness.netns import NetworkNamespace
from peercredd import namespaces, older
from peercredd.libbpf import Map
from peercredd.records import TUPLE, V4_MAPPED, hash_of_cookie, hash_of_tuple, older_key

pytestmark = pytest.mark.kernel

SO_COOKIE = 57


@pytest.fixture
def make_map() -> Iterator[Callable[[int], Map]]:
    made: list[Map] = []

    def make(max_entries: int) -> Map:
        made.append(bpf_maps.create(bpf_maps.HASH, 8, 4, max_entries))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Pair:
    """Two connected sockets, and the one that listened."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.client = socket.create_connection(self.listener.getsockname())
        self.server, _ = self.listener.accept()
        self.netns_cookie = namespaces.own_cookie()

    def is_known_to(self, table: Map, netns_cookie: int) -> bool:
        """Whether the tuple is there, whichever end is taken for the client."""
        ends = self.client.getsockname()[1], self.server.getsockname()[1]
        loopback = V4_MAPPED + socket.inet_aton("127.0.0.1")
        return any(
            table.lookup(older_key(hash_of_tuple(TUPLE.pack(*part)))) is not None
            for part in (
                (netns_cookie, loopback, loopback, *ends),
                (netns_cookie, loopback, loopback, *reversed(ends)),
            )
        )

    def close(self) -> None:
        for each in (self.listener, self.client, self.server):
            each.close()


def is_known(table: Map, sock: socket.socket) -> bool:
    cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")
    return table.lookup(older_key(hash_of_cookie(cookie))) is not None


def test_both_ends_and_their_tuple_are_learnt(make_map: Callable[[int], Map]) -> None:
    table = make_map(1 << 17)
    with closing(Pair()) as pair:
        learnt = older.learn(table)
        assert learnt["learnt"] >= 2
        assert learnt["left_out"] == 0
        assert is_known(table, pair.client)
        assert is_known(table, pair.server)
        assert pair.is_known_to(table, pair.netns_cookie)


def test_a_listener_is_not_learnt(make_map: Callable[[int], Map]) -> None:
    table = make_map(1 << 17)
    with closing(Pair()) as pair:
        older.learn(table)
        assert not is_known(table, pair.listener)


def test_what_began_later_is_not_learnt(make_map: Callable[[int], Map]) -> None:
    table = make_map(1 << 17)
    older.learn(table)
    with closing(Pair()) as pair:
        assert not is_known(table, pair.client)
        assert not pair.is_known_to(table, pair.netns_cookie)


def test_other_namespaces_are_learnt_and_kept_apart(make_map: Callable[[int], Map]) -> None:
    table = make_map(1 << 17)
    with NetworkNamespace() as namespace, closing(namespace.run(Pair)) as pair:
        namespace.run(older.learn, table)
        assert is_known(table, pair.client)
        assert is_known(table, pair.server)
        assert pair.is_known_to(table, pair.netns_cookie)
        assert not pair.is_known_to(table, namespaces.own_cookie())


def test_a_full_map_ends_the_learning_and_what_is_left_out_is_counted(
    make_map: Callable[[int], Map],
) -> None:
    table = make_map(3)
    with closing(Pair()):
        learnt = older.learn(table)
    assert learnt["learnt"] == 1
    assert learnt["left_out"] >= 1
    assert table.count() == 3
