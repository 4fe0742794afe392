from __future__ import annotations

import pytest

from harness import steps
from harness.channel import Descriptor
from harness.netns import NetworkNamespace
from harness.routes import (
    ANY_V4,
    LAN,
    LAN_V4,
    LAN_V6,
    LINK_LOCAL,
    LOOPBACK,
    MAPPED,
    MULTIPATH,
    USUAL,
    V4,
)
from harness.so_peercred import Peer
from harness.stage import Stage
from harness.steps import Route
from harness.users import ALICE, GAMES, SERVICE, STAFF

pytestmark = pytest.mark.kernel


def check_both_ends(stage: Stage, route: Route, namespace: NetworkNamespace | None = None) -> None:
    server = stage.actor(SERVICE, groups=(STAFF,), namespace=namespace)
    client = stage.actor(ALICE, gid=GAMES, groups=(STAFF, GAMES), namespace=namespace)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted) == Peer(client.pid, ALICE, GAMES, (STAFF, GAMES), 2)
    assert stage.peer(client, ends) == Peer(server.pid, SERVICE, SERVICE, (STAFF,), 1)


@pytest.mark.parametrize("route", LOOPBACK, ids=str)
def test_both_ends_are_known_over_every_spelling_of_loopback(stage: Stage, route: Route) -> None:
    check_both_ends(stage, route)


@pytest.mark.parametrize("route", MULTIPATH, ids=str)
def test_both_ends_are_known_over_multipath_tcp(swept_stage: Stage, route: Route) -> None:
    check_both_ends(swept_stage, route)


@pytest.mark.parametrize("route", LAN, ids=str)
def test_both_ends_are_known_over_the_hosts_own_lan_address(stage: Stage, route: Route) -> None:
    host, neighbour = stage.namespace(), stage.namespace()
    host.connect_to(neighbour, f"{LAN_V4}/24", "192.0.2.2/24")
    host.add_address(f"{LAN_V6}/64", "cable")
    host.add_address(f"{LINK_LOCAL}/64", "cable")
    host.command("ip", "route", "add", "local", f"{ANY_V4}/32", "dev", "lo")
    check_both_ends(stage, route, host)


@pytest.mark.parametrize("route", USUAL, ids=str)
def test_one_tuple_in_many_namespaces_is_as_many_connections(stage: Stage, route: Route) -> None:
    port, client_port = 7000, 7001
    played = []
    for number in range(12):
        namespace = stage.namespace()
        server = stage.actor(SERVICE + 100 + number, namespace=namespace)
        client = stage.actor(ALICE + 200 + number, namespace=namespace)
        listener = stage.listen(server, route, port=port)
        ends = stage.connect(client, listener, local=(str(route.target), client_port))
        played.append((server, server(steps.accept, listener.fds), client, ends))
    for number, (server, accepted, client, ends) in enumerate(played):
        assert stage.peer(server, accepted).uid == ALICE + 200 + number
        assert stage.peer(client, ends).uid == SERVICE + 100 + number


def test_a_v4_mapped_socket_that_is_turned_into_a_v4_one_keeps_its_peer(stage: Stage) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, MAPPED)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    for actor, fd in ((server, accepted.tcp), (client, ends.tcp)):
        actor(steps.turn_into_v4, fd)
        assert actor(steps.own_name, fd)[0] == "127.0.0.1"
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_socket_keeps_the_namespace_it_was_made_in(stage: Stage) -> None:
    inside = stage.namespace()
    server = stage.actor(SERVICE, namespace=inside)
    listener = stage.listen(server, V4)
    client = stage.actor()
    client(steps.enter_network_namespace, Descriptor(inside.fd))
    ends = client(steps.sockets, V4)
    client(steps.enter_network_namespace, Descriptor(stage.namespace().fd))
    # An abstract AF_UNIX name is looked for where the task is, TCP where the socket is.
    client(steps.connect_one, ends.tcp, listener.addresses.tcp)
    accepted = server(steps.accept_one, listener.fds.tcp)
    with server.borrow(accepted) as sock:
        assert stage.client.lookup(sock).pid == client.pid
