from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from harness import steps
from harness.actors import Actor
from harness.channel import Descriptor
from harness.oracle import as_peer
from harness.routes import MULTIPATH, V4
from harness.stage import Listener, Stage
from harness.steps import Both, Route
from harness.users import ALICE, BOB, CAROL, DAVE, GAMES, SERVICE, STAFF
from peercred import NotFound

TCP_FASTOPEN_NO_COOKIE = 34

pytestmark = pytest.mark.kernel


def connected(stage: Stage, route: Route) -> tuple[Listener, Actor, Both[int], Actor, Both[int]]:
    """SERVICE, which has accepted, and ALICE, who has connected."""
    server, client = stage.actor(SERVICE), stage.actor(ALICE, groups=(STAFF, GAMES))
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    return listener, server, server(steps.accept, listener.fds), client, ends


def test_a_client_that_is_gone_before_accept_is_known(stage: Stage, route: Route) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE, groups=(STAFF, GAMES))
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    client(steps.write, ends)
    client.exit()
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert server(steps.read, accepted) == Both(b"x", b"x")
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


def test_a_client_that_is_gone_after_accept_is_known(stage: Stage, route: Route) -> None:
    _, server, accepted, client, _ = connected(stage, route)
    client.kill()
    server(steps.wait_until_hung_up, accepted.tcp)
    assert stage.peer(server, accepted)[:4] == (client.pid, ALICE, ALICE, (STAFF, GAMES))


def test_a_server_that_is_gone_is_known_to_its_client(stage: Stage, route: Route) -> None:
    _, server, _, client, ends = connected(stage, route)
    server.kill()
    client(steps.wait_until_hung_up, ends.tcp)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_server_that_never_accepted_and_is_gone_is_known_to_its_client(
    stage: Stage, route: Route
) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    ends = stage.connect(client, stage.listen(server, route))
    server.exit()
    client(steps.wait_until_hung_up, ends.tcp)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


@pytest.mark.parametrize("data", [b"", b"unread"], ids=["nothing", "unread data"])
def test_a_client_that_resets_after_accept_is_known(
    stage: Stage, route: Route, data: bytes
) -> None:
    _, server, accepted, client, ends = connected(stage, route)
    if data:
        client(os.write, ends.tcp, data)
    client(steps.reset_delivered, ends.tcp)
    server(steps.wait_until_hung_up, accepted.tcp)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    if data:
        assert server(os.read, accepted.tcp, 100) == data
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


@pytest.mark.parametrize("data", [b"", b"unread"], ids=["nothing", "unread data"])
def test_a_client_that_resets_before_accept_is_known(
    stage: Stage, route: Route, data: bytes
) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    if data:
        client(os.write, ends.tcp, data)
    client(steps.reset_delivered, ends.tcp)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    if data:
        assert server(os.read, accepted.tcp, 100) == data
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


def test_a_server_that_resets_is_known_to_its_client(stage: Stage, route: Route) -> None:
    _, server, accepted, client, ends = connected(stage, route)
    server(steps.reset, accepted.tcp)
    client(steps.wait_until_hung_up, ends.tcp)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


@pytest.mark.parametrize("first", ["client", "server"])
def test_both_ends_are_known_after_both_have_shut_down(
    stage: Stage, route: Route, first: str
) -> None:
    _, server, accepted, client, ends = connected(stage, route)
    sides = [(client, ends.tcp), (server, accepted.tcp)]
    for actor, fd in sides if first == "client" else reversed(sides):
        actor(steps.shutdown, fd, socket.SHUT_RDWR)
    for actor, fd in sides:
        actor(steps.wait_until_closed, fd)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_client_whose_process_was_reaped_keeps_its_number(stage: Stage, route: Route) -> None:
    server, parent = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    child = stage.fork(parent)
    ends = stage.connect(child, listener)
    child(steps.close, ends)
    child.exit()
    parent(os.waitpid, child.pid, 0)
    assert stage.peer(server, server(steps.accept, listener.fds))[:2] == (child.pid, ALICE)


def test_a_socket_handed_over_is_still_its_connectors(stage: Stage, route: Route) -> None:
    play_handing_over(stage, route)


@pytest.mark.parametrize("route", MULTIPATH, ids=str)
def test_a_multipath_socket_handed_over_is_still_its_connectors(
    swept_stage: Stage, route: Route
) -> None:
    play_handing_over(swept_stage, route)


def play_handing_over(stage: Stage, route: Route) -> None:
    _, server, accepted, client, ends = connected(stage, route)
    heir, other_server = stage.actor(BOB), stage.actor(CAROL)
    inherited = Both(*client.give(ends, to=heir))
    handed = Both(*server.give(accepted, to=other_server))
    client.exit()
    server.exit()
    heir(steps.write, inherited)
    assert other_server(steps.read, handed) == Both(b"x", b"x")
    assert stage.peer(other_server, handed)[:2] == (client.pid, ALICE)
    assert stage.peer(heir, inherited)[:2] == (server.pid, SERVICE)


def test_a_socket_in_flight_between_processes_is_kept(stage: Stage, route: Route) -> None:
    _, server, accepted, client, _ = connected(stage, route)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        copies = server(steps.give, accepted)
        socket.send_fds(ours, [b"x"], [*copies])
        for copy in copies:
            os.close(copy)
        server.exit()
        client.exit()
        _, received, _, _ = socket.recv_fds(theirs, 1, 2)
        with socket.socket(fileno=received[0]), socket.socket(fileno=received[1]) as tcp:
            assert as_peer(stage.client.lookup(tcp))[:2] == (client.pid, ALICE)


def test_one_of_several_descriptors_keeps_the_answer(stage: Stage, route: Route) -> None:
    _, server, accepted, client, ends = connected(stage, route)
    copy = server(os.dup, accepted.tcp)
    child = stage.fork(server)
    server(os.close, accepted.tcp)
    client(os.close, ends.tcp)
    assert stage.answer(server, copy).uid == ALICE
    server.exit()
    assert stage.peer(child, Both(accepted.unix, copy))[:2] == (client.pid, ALICE)


def test_a_listener_is_who_called_listen_whatever_becomes_of_it(stage: Stage, route: Route) -> None:
    server, client, heir = stage.actor(), stage.actor(ALICE), stage.actor(BOB)
    server(os.seteuid, SERVICE)
    listener = stage.listen(server, route)
    server(os.seteuid, 0)
    server(steps.become, CAROL)
    inherited = stage.fork(server)
    handed = Both(*server.give(listener.fds, to=heir))
    before = stage.connect(client, listener)
    server.exit()
    after = stage.connect(client, listener)
    for acceptor, fds, ends in ((inherited, listener.fds, before), (heir, handed, after)):
        assert stage.peer(acceptor, acceptor(steps.accept, fds))[:2] == (client.pid, ALICE)
        assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_listener_is_not_who_called_bind(stage: Stage, route: Route) -> None:
    binder, server, client = stage.actor(), stage.actor(SERVICE), stage.actor(ALICE)
    bound = binder(steps.bind, route)
    fds = Both(*binder.give(bound, to=server))
    binder.exit()
    server(steps.listen, fds)
    ends = client(steps.sockets, route)
    client(steps.connect, ends, server(steps.addresses, fds, route))
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_listener_that_was_shut_down_is_who_listens_next(stage: Stage, route: Route) -> None:
    first, second, client = stage.actor(SERVICE), stage.actor(BOB), stage.actor(ALICE)
    listener = stage.listen(first, route)
    fds = Both(*first.give(listener.fds, to=second))
    first(steps.shutdown, listener.fds.tcp, socket.SHUT_RDWR)
    second(steps.listen, fds)
    ends = client(steps.sockets, route)
    client(steps.connect, ends, second(steps.addresses, fds, route))
    assert stage.peer(client, ends)[:2] == (second.pid, BOB)
    assert stage.peer(second, second(steps.accept, fds))[:2] == (client.pid, ALICE)


def test_listeners_that_share_a_port_are_told_apart(stage: Stage, route: Route) -> None:
    # Only one user may share a port, but anybody may be handed a socket to listen on.
    maker = stage.actor()
    option = (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    servers: dict[Actor, Both[int]] = {}
    unix_of: dict[Actor, object] = {}
    port = 0
    for uid in (SERVICE, BOB, CAROL, DAVE):
        server = stage.actor(uid)
        bound = maker(steps.bind, route, port, (option,))
        targets = maker(steps.addresses, bound, route)
        port = targets.tcp[1]
        servers[server] = Both(*maker.give(bound, to=server))
        server(steps.listen, servers[server])
        unix_of[server] = targets.unix
    reached: set[Actor] = set()
    # The kernel chooses by a hash of the client's port.
    while reached != set(servers):
        client = stage.actor(ALICE)
        fds = client(steps.sockets, route)
        client(steps.connect_one, fds.tcp, targets.tcp)
        (server,) = (each for each in servers if each(steps.readable, servers[each].tcp))
        client(steps.connect_one, fds.unix, unix_of[server])
        accepted = server(steps.accept, servers[server])
        assert stage.peer(client, fds).pid == server.pid
        assert stage.peer(server, accepted).pid == client.pid
        reached.add(server)


def test_a_disconnected_socket_has_no_peer_and_its_server_still_has(
    stage: Stage, route: Route
) -> None:
    _, server, accepted, client, ends = connected(stage, route)
    client(steps.disconnect, ends.tcp)
    assert stage.refusal(client, ends.tcp) == "INVALID_ARGUMENT"
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


def half_close(actor: Actor, fd: int, other: Actor, other_fd: int) -> None:
    actor(steps.shutdown, fd, socket.SHUT_WR)
    other(steps.wait_until_hung_up, other_fd)
    actor(steps.wait_until_acknowledged, fd)


def be_half_closed(actor: Actor, fd: int, other: Actor, other_fd: int) -> None:
    half_close(other, other_fd, actor, fd)


def be_reset(actor: Actor, fd: int, other: Actor, other_fd: int) -> None:
    other(steps.reset, other_fd)
    actor(steps.wait_until_hung_up, fd)


@pytest.mark.parametrize(
    "before",
    [
        half_close,
        be_half_closed,
        pytest.param(
            be_reset,
            marks=pytest.mark.xfail(
                reason="no hook is told that a socket in state CLOSE is disconnected", strict=True
            ),
        ),
    ],
)
@pytest.mark.parametrize("end", ["client", "server"])
def test_a_socket_has_no_peer_whatever_it_went_through_before_it_was_disconnected(
    stage: Stage, before: Callable[[Actor, int, Actor, int], None], end: str
) -> None:
    _, server, accepted, client, ends = connected(stage, V4)
    sides = [(client, ends.tcp), (server, accepted.tcp)]
    (actor, fd), (other, other_fd) = sides if end == "client" else sides[::-1]
    before(actor, fd, other, other_fd)
    actor(steps.disconnect, fd)
    assert stage.refusal(actor, fd) in ("INVALID_ARGUMENT", "RETIRED")


def test_a_disconnected_socket_connected_anew_is_the_new_users(stage: Stage, route: Route) -> None:
    _, server, accepted, client, ends = connected(stage, route)
    second_server, bob = stage.actor(CAROL), stage.actor(BOB)
    second = stage.listen(second_server, route)
    (tcp,) = client.give([ends.tcp], to=bob)
    client(steps.disconnect, ends.tcp)
    theirs = Both(bob(steps.unix_socket), tcp)
    bob(steps.connect, theirs, second.addresses)
    second_accepted = second_server(steps.accept, second.fds)
    assert stage.peer(second_server, second_accepted)[:2] == (bob.pid, BOB)
    assert stage.peer(bob, theirs)[:2] == (second_server.pid, CAROL)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


@pytest.mark.parametrize("end", ["client", "server"])
def test_a_socket_used_again_has_no_peer_before_its_deferred_connect_is_sent(
    stage: Stage, end: str
) -> None:
    server, client, new = stage.actor(SERVICE), stage.actor(ALICE), stage.actor(BOB)
    listener, elsewhere = stage.listen(server, V4), stage.listen(new, V4)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    sides = [(client, ends.tcp), (server, accepted.tcp)]
    (other, other_fd), (actor, fd) = sides if end == "server" else reversed(sides)
    other(steps.shutdown, other_fd, socket.SHUT_WR)
    actor(steps.shutdown, fd, socket.SHUT_WR)
    actor(steps.wait_until_closed, fd)
    actor(steps.disconnect, fd)

    with actor.borrow(fd) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
    actor(steps.defer, fd, elsewhere.addresses.tcp)
    assert stage.refusal(actor, fd)
    with actor.borrow(fd) as sock:
        sock.sendall(b"x")
    assert actor(steps.tcp_peer, fd)[0] == (new.pid, BOB, BOB)


def test_an_accepted_socket_that_was_disconnected_has_no_peer(stage: Stage, route: Route) -> None:
    _, server, accepted, client, ends = connected(stage, route)
    server(steps.disconnect, accepted.tcp)
    assert stage.refusal(server, accepted.tcp) == "RETIRED"
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_an_accepted_socket_connected_anew_is_a_client(stage: Stage, route: Route) -> None:
    _, server, accepted, client, ends = connected(stage, route)
    second_server, bob = stage.actor(CAROL), stage.actor(BOB)
    second = stage.listen(second_server, route)
    (tcp,) = server.give([accepted.tcp], to=bob)
    bob(steps.disconnect, tcp)
    target = second_server(steps.addresses, second.fds, route)
    theirs = Both(bob(steps.unix_socket), tcp)
    bob(steps.connect, theirs, target)
    second_accepted = second_server(steps.accept, second.fds)
    assert stage.peer(second_server, second_accepted)[:2] == (bob.pid, BOB)
    assert stage.peer(bob, theirs)[:2] == (second_server.pid, CAROL)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


@pytest.mark.parametrize("was", ["client", "accepted"])
def test_a_disconnected_socket_that_listens_is_the_new_users(
    stage: Stage, route: Route, was: str
) -> None:
    _, server, accepted, client, ends = connected(stage, route)
    owner, fd = (client, ends.tcp) if was == "client" else (server, accepted.tcp)
    bob, carol = stage.actor(BOB), stage.actor(CAROL)
    (tcp,) = owner.give([fd], to=bob)
    bob(steps.disconnect, tcp)
    fresh = bob(steps.bind, route)
    fds = Both(fresh.unix, tcp)
    bob(steps.listen, fds)
    theirs = carol(steps.sockets, route)
    carol(steps.connect, theirs, bob(steps.addresses, fds, route))
    assert stage.peer(carol, theirs)[:2] == (bob.pid, BOB)
    assert stage.peer(bob, bob(steps.accept, fds))[:2] == (carol.pid, CAROL)


def test_a_listener_that_is_disconnected_and_connects_is_a_client(
    stage: Stage, route: Route
) -> None:
    former, server = stage.actor(ALICE), stage.actor(SERVICE)
    bound = stage.listen(former, route)
    listener = stage.listen(server, route)
    former(steps.disconnect, bound.fds.tcp)
    ends = Both(former(steps.unix_socket), bound.fds.tcp)
    former(steps.connect, ends, listener.addresses)
    assert stage.peer(server, server(steps.accept, listener.fds))[:2] == (former.pid, ALICE)
    assert stage.peer(former, ends)[:2] == (server.pid, SERVICE)


def test_when_all_is_closed_the_answer_is_that_it_was_closed(stage: Stage, route: Route) -> None:
    _, server, accepted, client, _ = connected(stage, route)
    cookie = stage.answer(server, accepted.tcp).server_socket_cookie
    local, remote = server(steps.names, accepted.tcp)
    client.exit()
    server(steps.close, accepted)
    stage.wait_until_empty()
    answers = stage.client.lookup_many([(local, remote), (remote, local)])
    with pytest.raises(NotFound) as refused:
        stage.client.lookup_cookie(cookie)
    for answer in (refused.value, *answers):
        assert isinstance(answer, NotFound)
        assert answer.reason == "RETIRED"


def test_what_can_still_be_asked_is_not_swept(swept_stage: Stage, route: Route) -> None:
    stage = swept_stage
    played = [connected(stage, route) for _ in range(4)]
    _, _, _, client, ends = played[0]
    client(os.write, ends.tcp, b"unread")
    client(steps.reset_delivered, ends.tcp)
    played[1][3].exit()
    stage.wait_for_sweep()
    stage.wait_for_sweep()
    for number, (_, server, accepted, client, ends) in enumerate(played):
        assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
        if number > 1:
            assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_namespace_that_only_sockets_are_left_of_is_not_swept(swept_stage: Stage) -> None:
    stage = swept_stage
    emptied = stage.namespace()
    server = stage.actor(namespace=emptied)
    client = stage.actor(namespace=emptied)
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    for actor in (server, client):
        actor(steps.enter_network_namespace, Descriptor(stage.namespace().fd))
    emptied.close()
    stage.wait_for_sweep()
    stage.wait_for_sweep()
    assert stage.peer(server, accepted).pid == client.pid
    assert stage.peer(client, ends).pid == server.pid


@pytest.mark.xfail(reason="no hook set is told of a second listen()", strict=True)
def test_a_listener_may_listen_again_and_is_then_the_one_who_did(stage: Stage) -> None:
    first, second, client = stage.actor(SERVICE), stage.actor(BOB), stage.actor(ALICE)
    listener = stage.listen(first, V4)
    before = stage.connect(client, listener)
    second(steps.listen, Both(*first.give(listener.fds, to=second)))
    after = stage.connect(client, listener)
    assert stage.peer(client, before)[:2] == (first.pid, SERVICE)
    assert stage.peer(client, after)[:2] == (second.pid, BOB)
