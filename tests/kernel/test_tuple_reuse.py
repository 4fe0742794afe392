"""The same four numbers, one user after another, while old sockets are still open."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from harness import oracle, steps
from harness.actors import Actor, Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.routes import USUAL
from harness.stage import Listener, Stage
from harness.steps import Address, Both, Route
from harness.users import ALICE, BOB, CAROL, SERVICE
from peercred import NotFound
from peercred.v1 import peer_credentials_pb2 as pb

pytestmark = pytest.mark.kernel


@pytest.fixture(params=USUAL, ids=str)
def route(request: pytest.FixtureRequest) -> Route:
    route: Route = request.param
    return route


@pytest.fixture
def stage(stage: Stage) -> Stage:
    """One where nobody else takes a port that was given back."""
    stage.place = stage.namespace()
    return stage


End = Callable[[Actor, int, Actor, int], None]


def by_reset(client: Actor, end: int, server: Actor, accepted: int) -> None:
    client(steps.reset, end)
    server(steps.wait_until_hung_up, accepted)


def by_shutdown(client: Actor, end: int, server: Actor, accepted: int) -> None:
    # The server's side comes first, so that it is the one that waits in TIME_WAIT:
    # its socket is CLOSE, and a new SYN may take the tuple over.
    server(steps.shutdown, accepted, socket.SHUT_RDWR)
    client(steps.shutdown, end, socket.SHUT_RDWR)
    server(steps.wait_until_closed, accepted)


ways_to_end = pytest.mark.parametrize("end", [by_reset, by_shutdown], ids=["reset", "shutdown"])


class Names:
    """One tuple, in the words of either end."""

    def __init__(self, server: Actor, accepted: int) -> None:
        self.local, self.remote = server(steps.names, accepted)
        self.client: Address = (self.remote[0], self.remote[1])
        with server.borrow(accepted) as sock:
            self.netns_cookie = oracle.cookie(sock, oracle.SO_NETNS_COOKIE)

    def key(self, cookie: int | None = None) -> pb.ConnectionKey:
        key = pb.ConnectionKey(
            local=pb.Endpoint(address=self.local[0], port=self.local[1]),
            remote=pb.Endpoint(address=self.remote[0], port=self.remote[1]),
            netns_cookie=self.netns_cookie,
        )
        if cookie is not None:
            key.socket_cookie = cookie
        return key


def cookie_of(actor: Actor, fd: int) -> int:
    with actor.borrow(fd) as sock:
        return oracle.cookie(sock)


def uid_or_reason(daemon: Daemon, key: pb.ConnectionKey) -> int | str:
    try:
        return oracle.ask_raw(daemon.address, key).peer.uid
    except NotFound as error:
        return error.reason


def first_connection(
    stage: Stage, route: Route
) -> tuple[Listener, Actor, Both[int], Actor, Both[int]]:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    local = (route.target, 0)
    ends = stage.connect(client, listener, local=local)
    return listener, server, server(steps.accept, listener.fds), client, ends


@dataclass(frozen=True)
class Reuse:
    """Alice's connection has ended, though nobody has closed it; Bob has its tuple now."""

    names: Names
    server: Actor
    alice: Actor
    old: Both[int]
    bob: Actor
    new_ends: Both[int]
    new: Both[int]


def reused(stage: Stage, route: Route, end: End) -> Reuse:
    listener, server, old, alice, ends = first_connection(stage, route)
    names = Names(server, old.tcp)
    end(alice, ends.tcp, server, old.tcp)
    bob = stage.actor(BOB)
    new_ends = stage.connect(bob, listener, local=names.client)
    new = server(steps.accept, listener.fds)
    assert server(steps.names, new.tcp) == (names.local, names.remote)
    return Reuse(names, server, alice, old, bob, new_ends, new)


@ways_to_end
def test_an_old_accepted_socket_answers_with_its_own_user_by_cookie(
    stage: Stage, daemon: Daemon, route: Route, end: End
) -> None:
    now = reused(stage, route, end)
    assert stage.peer(now.server, now.old)[:2] == (now.alice.pid, ALICE)
    assert stage.peer(now.server, now.new)[:2] == (now.bob.pid, BOB)
    assert stage.peer(now.bob, now.new_ends)[:2] == (now.server.pid, SERVICE)
    both = now.names.key(cookie_of(now.server, now.old.tcp))
    assert uid_or_reason(daemon, both) in (ALICE, "RETIRED")
    assert oracle.ask_raw(daemon.address, now.names.key()).peer.uid == BOB
    new_both = now.names.key(cookie_of(now.server, now.new.tcp))
    assert oracle.ask_raw(daemon.address, new_both).peer.uid == BOB


@ways_to_end
def test_the_tuple_of_a_newer_connection_that_is_gone_does_not_name_the_older(
    stage: Stage, daemon: Daemon, route: Route, end: End
) -> None:
    now = reused(stage, route, end)
    now.bob(steps.reset, now.new_ends.tcp)
    now.server(steps.close, now.new)
    assert uid_or_reason(daemon, now.names.key()) == "RETIRED"
    assert stage.peer(now.server, now.old)[:2] == (now.alice.pid, ALICE)


@ways_to_end
def test_the_end_of_an_older_connection_takes_nothing_from_the_newer(
    stage: Stage, daemon: Daemon, route: Route, end: End
) -> None:
    now = reused(stage, route, end)
    now.server(steps.close, now.old)
    now.alice.exit()
    assert oracle.ask_raw(daemon.address, now.names.key()).peer.uid == BOB
    assert stage.peer(now.server, now.new)[:2] == (now.bob.pid, BOB)
    assert stage.peer(now.bob, now.new_ends)[:2] == (now.server.pid, SERVICE)


@ways_to_end
def test_ten_generations_of_one_tuple_are_told_apart(
    stage: Stage, daemon: Daemon, route: Route, end: End
) -> None:
    listener, server, accepted, client, ends = first_connection(stage, route)
    names = Names(server, accepted.tcp)
    generations = [(client, accepted)]
    for number in range(1, 10):
        end(client, ends.tcp, server, accepted.tcp)
        client = stage.actor(ALICE + number)
        ends = stage.connect(client, listener, local=names.client)
        accepted = server(steps.accept, listener.fds)
        generations.append((client, accepted))
        assert oracle.ask_raw(daemon.address, names.key()).peer.uid == ALICE + number
    for number, (client, accepted) in enumerate(generations):
        assert stage.peer(server, accepted)[:2] == (client.pid, ALICE + number)


def test_an_old_client_socket_answers_with_its_own_listener_by_cookie(
    stage: Stage, daemon: Daemon, route: Route
) -> None:
    _, server, old, alice, ends = first_connection(stage, route)
    names = Names(server, old.tcp)
    old_cookie = cookie_of(alice, ends.tcp)
    server(steps.reset, old.tcp)
    alice(steps.wait_until_hung_up, ends.tcp)
    server.exit()
    second_server, bob = stage.actor(CAROL), stage.actor(BOB)
    second = stage.listen(second_server, route, port=names.local[1])
    new_ends = stage.connect(bob, second, local=names.client)
    new = second_server(steps.accept, second.fds)
    assert second_server(steps.names, new.tcp) == (names.local, names.remote)

    assert stage.peer(alice, ends)[:2] == (server.pid, SERVICE)
    assert stage.peer(bob, new_ends)[:2] == (second_server.pid, CAROL)
    key = names.key()
    key.local.CopyFrom(names.key().remote)
    key.remote.CopyFrom(names.key().local)
    assert oracle.ask_raw(daemon.address, key).peer.uid == CAROL
    key.socket_cookie = old_cookie
    assert uid_or_reason(daemon, key) in (SERVICE, "RETIRED")


@ways_to_end
def test_a_newer_connection_without_a_record_does_not_get_the_older_ones_name(
    stage: Stage, daemon: Daemon, route: Route, end: End
) -> None:
    listener, server, old, alice, ends = first_connection(stage, route)
    names = Names(server, old.tcp)
    end(alice, ends.tcp, server, old.tcp)
    with (
        Cgroup() as uncaptured,
        Origin(uncaptured) as origin,
        Stage(origin, stage.client) as elsewhere,
    ):
        bob = elsewhere.actor(BOB, namespace=stage.place)
        elsewhere.connect(bob, listener, local=names.client)
        new = server(steps.accept, listener.fds)

        assert uid_or_reason(daemon, names.key()) == "NEVER_SEEN"
        assert stage.refusal(server, new.tcp) == "NEVER_SEEN"
        assert stage.peer(server, old)[:2] == (alice.pid, ALICE)
        server(steps.close, new)


def test_a_tuple_turned_round_is_another_connection(
    stage: Stage, daemon: Daemon, route: Route
) -> None:
    listener, server, old, alice, ends = first_connection(stage, route)
    names = Names(server, old.tcp)
    by_reset(alice, ends.tcp, server, old.tcp)
    server(steps.close, listener.fds)
    second_server, bob = stage.actor(CAROL), stage.actor(BOB)
    second = stage.listen(second_server, route, port=names.client[1])
    new_ends = stage.connect(bob, second, local=(names.local[0], names.local[1]))
    new = second_server(steps.accept, second.fds)
    assert second_server(steps.names, new.tcp) == (names.remote, names.local)

    assert stage.peer(bob, new_ends)[:2] == (second_server.pid, CAROL)
    assert stage.peer(second_server, new)[:2] == (bob.pid, BOB)
    assert oracle.ask_raw(daemon.address, names.key()).peer.uid == CAROL
