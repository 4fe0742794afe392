from __future__ import annotations

import os

import pytest

import peercred
from harness import steps
from harness.actors import Actor
from harness.io_uring import Mode
from harness.oracle import SO_NETNS_COOKIE, as_peer, cookie
from harness.routes import MULTIPATH, V4, V6
from harness.stage import Listener, Stage
from harness.steps import DEFER_ACCEPT, TCP_ESTABLISHED, TCPI_OPT_SYN_DATA, Both, ByRing, Route
from harness.users import ALICE, BOB, CAROL, DAVE, GAMES, SERVICE, STAFF

pytestmark = pytest.mark.kernel

# Bits of net.ipv4.tcp_fastopen (Documentation/networking/ip-sysctl.rst): clients may,
# without a cookie; servers may, without a cookie, for every listener.
FAST_OPEN_CLIENT = 0x5
FAST_OPEN = FAST_OPEN_CLIENT | 0x602


def fast_open_stage(stage: Stage, route: Route, sysctl: int) -> tuple[Listener, list[Actor]]:
    """A listener, and its server with three clients, where Fast Open is allowed."""
    namespace = stage.namespace()
    namespace.sysctl("net.ipv4.tcp_fastopen", sysctl)
    server = stage.actor(SERVICE, namespace=namespace)
    clients = [stage.actor(uid, namespace=namespace) for uid in (ALICE, BOB, CAROL)]
    return stage.listen(server, route), [server, *clients]


def went_in_the_syn(client: Actor, fd: int) -> bool:
    return bool(client(steps.tcp_info, fd)[1] & TCPI_OPT_SYN_DATA)


def test_a_non_blocking_connect_is_whose_it_was(stage: Stage, route: Route) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener, steps.connect_nonblocking)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("uid", [None, BOB], ids=["own", "registered"])
def test_a_connect_through_io_uring_is_whose_credentials_it_ran_under(
    stage: Stage, route: Route, mode: Mode, uid: int | None
) -> None:
    server, client = stage.actor(SERVICE), stage.actor()
    client(os.setgroups, [STAFF, GAMES])
    if uid is None:
        client(os.setresuid, ALICE, ALICE, ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener, ByRing(mode, uid))
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, uid or ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


@pytest.mark.parametrize("sysctl", [FAST_OPEN, FAST_OPEN_CLIENT], ids=["accepted", "declined"])
def test_a_fast_open_is_whose_it_was(stage: Stage, route: Route, sysctl: int) -> None:
    listener, (server, client, *_) = fast_open_stage(stage, route, sysctl)
    ends = stage.connect(client, listener, steps.connect_fast_open)
    assert went_in_the_syn(client, ends.tcp) == (sysctl == FAST_OPEN)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


@pytest.mark.parametrize("sysctl", [FAST_OPEN, FAST_OPEN_CLIENT], ids=["accepted", "declined"])
def test_a_fast_open_client_that_is_gone_before_accept_is_known(
    stage: Stage, route: Route, sysctl: int
) -> None:
    listener, (server, client, *_) = fast_open_stage(stage, route, sysctl)
    stage.connect(client, listener, steps.connect_fast_open)
    client.exit()
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


@pytest.mark.parametrize("sysctl", [FAST_OPEN, FAST_OPEN_CLIENT], ids=["accepted", "declined"])
def test_a_deferred_fast_open_is_whose_connect_it_was_not_the_writers(
    stage: Stage, route: Route, sysctl: int
) -> None:
    listener, (server, client, writer, _) = fast_open_stage(stage, route, sysctl)
    ends = stage.connect(client, listener, steps.connect_deferred)
    assert not server(steps.readable, listener.fds.tcp)
    theirs = client.give(ends, to=writer)
    writer(steps.write, Both(*theirs))
    assert went_in_the_syn(client, ends.tcp) == (sysctl == FAST_OPEN)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(writer, Both(*theirs))[:2] == (server.pid, SERVICE)


def test_a_deferred_fast_open_is_who_the_process_was_at_connect(stage: Stage, route: Route) -> None:
    listener, (server, *_, bob, _) = fast_open_stage(stage, route, FAST_OPEN)
    client = stage.fork(bob)
    ends = stage.connect(client, listener, steps.connect_deferred)
    client.execute(kept=ends)
    client(steps.write, ends)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, BOB)


def test_a_deferred_fast_open_keeps_its_name_through_a_second_connect(
    stage: Stage, route: Route
) -> None:
    listener, (server, client, other, _) = fast_open_stage(stage, route, FAST_OPEN)
    ends = stage.connect(client, listener, steps.connect_deferred)
    theirs = Both(*client.give(ends, to=other))
    with pytest.raises(OSError, match="already connected"):
        other(steps.connect_one, theirs.unix, listener.addresses.unix)
    # TCP says the same only if it need not wait for the handshake, which waits for a write.
    with pytest.raises(OSError, match="already connected"):
        other(steps.start_connect, theirs.tcp, listener.addresses.tcp)
    other(os.set_blocking, theirs.tcp, True)
    other(steps.write, theirs)
    assert stage.peer(server, server(steps.accept, listener.fds))[:2] == (client.pid, ALICE)


def test_a_deferred_fast_open_keeps_its_name_when_another_sends_a_fast_open(
    stage: Stage, route: Route
) -> None:
    listener, (server, client, other, _) = fast_open_stage(stage, route, FAST_OPEN)
    ends = stage.connect(client, listener, steps.connect_deferred)
    (theirs,) = client.give([ends.tcp], to=other)
    other(steps.fast_open, theirs, listener.addresses.tcp)
    assert stage.peer(server, server(steps.accept, listener.fds))[:2] == (client.pid, ALICE)


def test_a_deferred_fast_open_outlives_who_called_connect(stage: Stage, route: Route) -> None:
    listener, (server, client, writer, _) = fast_open_stage(stage, route, FAST_OPEN)
    theirs = Both(*client.give(stage.connect(client, listener, steps.connect_deferred), to=writer))
    client.exit()
    writer(steps.write, theirs)
    assert stage.peer(server, server(steps.accept, listener.fds))[:2] == (client.pid, ALICE)


def test_a_deferred_fast_open_that_is_never_written_to_leaves_nothing(
    stage: Stage, route: Route
) -> None:
    listener, (_, client, *_) = fast_open_stage(stage, route, FAST_OPEN)
    stage.connect(client, listener, steps.connect_deferred)
    stage.assert_empty()


def test_a_deferred_fast_open_socket_taken_over_by_another_is_the_others(
    stage: Stage, route: Route
) -> None:
    listener, (server, client, other, _) = fast_open_stage(stage, route, FAST_OPEN)
    ends = stage.connect(client, listener, steps.connect_deferred)
    (tcp,) = client.give([ends.tcp], to=other)
    other(steps.disconnect, tcp)
    theirs = Both(other(steps.unix_socket), tcp)
    other(steps.connect_deferred, theirs, listener.addresses)
    client(steps.write, Both(ends.unix, ends.tcp))
    server(steps.accept_one, listener.fds.unix)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (other.pid, BOB)


# The kernel closes the subflows of a multipath socket where no program is told of it: what
# is left of them is swept.


@pytest.mark.parametrize("route", MULTIPATH, ids=str)
def test_a_deferred_fast_open_of_multipath_tcp_never_lends_the_writers_name(
    swept_stage: Stage, route: Route
) -> None:
    stage = swept_stage
    listener, (server, client, writer, _) = fast_open_stage(stage, route, FAST_OPEN)
    ends = stage.connect(client, listener, steps.connect_deferred)
    writer(steps.write, Both(*client.give(ends, to=writer)))
    accepted = server(steps.accept, listener.fds)
    with server.borrow(accepted.tcp) as sock:
        try:
            peer = as_peer(stage.client.lookup(sock))
        except peercred.NotFound:
            return
    assert peer[:2] == (client.pid, ALICE)


@pytest.mark.parametrize("route", MULTIPATH[:1], ids=str)
def test_a_further_subflow_of_multipath_tcp_is_not_the_kernel_threads_that_makes_it(
    swept_stage: Stage, route: Route
) -> None:
    stage = swept_stage
    namespace = stage.namespace()
    namespace.command("ip", "mptcp", "limits", "set", "subflow", "2", "add_addr_accepted", "2")
    namespace.command("ip", "mptcp", "endpoint", "add", "127.0.0.2", "dev", "lo", "subflow")
    server = stage.actor(SERVICE, namespace=namespace)
    client = stage.actor(ALICE, namespace=namespace)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    client(steps.write, ends)
    server(steps.write, accepted)
    namespace.wait_for_counter("MPTcpExt", "MPJoinAckRx")
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    with client.borrow(ends.tcp) as sock:
        recorded = list(stage.client.connections(netns_cookie=cookie(sock, SO_NETNS_COOKIE)))
    assert [connection.client.pid for connection in recorded] == [client.pid]


@pytest.mark.parametrize("route", MULTIPATH, ids=str)
def test_a_multipath_client_that_is_gone_before_accept_is_known(
    swept_stage: Stage, route: Route
) -> None:
    stage = swept_stage
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    stage.connect(client, listener)
    client.exit()
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


def test_syn_cookies_change_nothing(stage: Stage, route: Route) -> None:
    namespace = stage.namespace()
    namespace.sysctl("net.ipv4.tcp_syncookies", 2)
    server = stage.actor(SERVICE, namespace=namespace)
    client = stage.actor(ALICE, namespace=namespace)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    assert namespace.counter("TcpExt", "SyncookiesRecv")
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_connection_accepted_at_its_first_byte_is_whose_connect_it_was(
    stage: Stage, route: Route
) -> None:
    server, client, writer = stage.actor(SERVICE), stage.actor(ALICE), stage.actor(BOB)
    listener = stage.listen(server, route, options=(DEFER_ACCEPT,))
    ends = stage.connect(client, listener)
    assert client(steps.tcp_info, ends.tcp)[0] == TCP_ESTABLISHED
    assert not server(steps.readable, listener.fds.tcp)
    assert stage.refusal(client, ends.tcp) == "NEVER_SEEN"
    theirs = client.give(ends, to=writer)
    client.exit()
    writer(steps.write, Both(*theirs))
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(writer, Both(*theirs))[:2] == (server.pid, SERVICE)


def test_a_connection_closed_before_its_first_byte_leaves_nothing(
    stage: Stage, route: Route
) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route, options=(DEFER_ACCEPT,))
    ends = stage.connect(client, listener)
    client(os.close, ends.tcp)
    server(os.close, listener.fds.tcp)
    stage.wait_until_empty()


def test_a_connection_reset_before_its_first_byte_is_swept(
    swept_stage: Stage, route: Route
) -> None:
    server, client = swept_stage.actor(SERVICE), swept_stage.actor(ALICE)
    listener = swept_stage.listen(server, route, options=(DEFER_ACCEPT,))
    # Established for the client; the server's socket is never born.
    ends = swept_stage.connect(client, listener)
    client(steps.reset, ends.tcp)
    swept_stage.wait_until_empty()


def test_those_who_wait_for_a_full_queue_are_known_when_their_turn_comes(
    swept_stage: Stage, route: Route
) -> None:
    stage = swept_stage
    server = stage.actor(SERVICE)
    listener = stage.listen(server, route, backlog=1)
    waiting = {}
    for uid in (ALICE, BOB, CAROL, DAVE) * 2:
        client = stage.actor(uid)
        fds = client(steps.sockets, route)
        client(steps.start_connect, fds.tcp, listener.addresses.tcp)
        waiting[client(steps.own_name, fds.tcp)[1]] = client, fds.tcp, uid
    states = {client(steps.tcp_info, fd)[0] for client, fd, _ in waiting.values()}
    assert len(states) > 1, "the queue was never full"
    # Whose last ACK came while it was full is let in with what is written, or perhaps never.
    written = {
        port: client.start(steps.write_when_connected, fd)
        for port, (client, fd, _) in waiting.items()
    }
    while waiting:
        accepted = server(steps.accept_one, listener.fds.tcp)
        port = server(steps.names, accepted)[1][1]
        client, fd, uid = waiting.pop(port)
        answer = stage.answer(server, accepted)
        assert (answer.pid, answer.uid) == (client.pid, uid)
        written[port].result()
        assert stage.answer(client, fd).pid == server.pid


def test_those_who_give_up_on_a_full_queue_leave_nothing(stage: Stage, route: Route) -> None:
    server = stage.actor(SERVICE)
    listener = stage.listen(server, route, backlog=0)
    for uid in (ALICE, BOB, CAROL, DAVE):
        client = stage.actor(uid)
        fds = client(steps.sockets, route)
        client(steps.start_connect, fds.tcp, listener.addresses.tcp)
        client.kill()
    server.kill()
    stage.wait_until_empty()


def test_a_refused_connect_leaves_nothing(stage: Stage, route: Route) -> None:
    stage.place = stage.namespace()  # where nobody else listens on the closed port
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    server(os.close, listener.fds.tcp)
    fds = client(steps.sockets, route)
    with pytest.raises(ConnectionRefusedError):
        client(steps.connect_one, fds.tcp, listener.addresses.tcp)
    stage.assert_empty()


def test_a_socket_that_was_refused_is_whose_connect_succeeds(stage: Stage, route: Route) -> None:
    stage.place = stage.namespace()  # where nobody else listens on the closed port
    server, client, other = stage.actor(SERVICE), stage.actor(ALICE), stage.actor(BOB)
    closed, listener = stage.listen(server, route), stage.listen(server, route)
    server(os.close, closed.fds.tcp)
    fds = client(steps.sockets, route)
    with pytest.raises(ConnectionRefusedError):
        client(steps.connect_one, fds.tcp, closed.addresses.tcp)
    theirs = Both(*client.give(fds, to=other))
    other(steps.connect, theirs, listener.addresses)
    assert stage.peer(server, server(steps.accept, listener.fds))[:2] == (other.pid, BOB)


def play_connections_nobody_accepts(stage: Stage, route: Route) -> None:
    server, first, second = stage.actor(SERVICE), stage.actor(ALICE), stage.actor(BOB)
    listener = stage.listen(server, route)
    ends = stage.connect(first, listener)
    stage.connect(second, listener)
    first(os.close, ends.tcp)
    server.exit()
    second.exit()
    stage.wait_until_empty()


def test_a_connection_nobody_accepts_leaves_nothing(stage: Stage, route: Route) -> None:
    play_connections_nobody_accepts(stage, route)


def test_connections_reset_before_accept_and_never_accepted_are_swept(
    swept_stage: Stage, route: Route
) -> None:
    stage = swept_stage
    server = stage.actor(SERVICE)
    listener = stage.listen(server, route)
    for data in (b"", b"unread"):
        client = stage.actor(ALICE)
        ends = stage.connect(client, listener)
        if data:
            client(os.write, ends.tcp, data)
        client(steps.reset_delivered, ends.tcp)
        client.exit()
    server.exit()
    stage.wait_until_empty()


@pytest.mark.parametrize("route", MULTIPATH, ids=str)
def test_a_multipath_connection_nobody_accepts_is_swept(swept_stage: Stage, route: Route) -> None:
    play_connections_nobody_accepts(swept_stage, route)


@pytest.mark.parametrize("route", MULTIPATH, ids=str)
@pytest.mark.parametrize("resetting", ["client", "server"])
def test_a_multipath_connection_that_is_reset_is_swept(
    swept_stage: Stage, route: Route, resetting: str
) -> None:
    server, client = swept_stage.actor(SERVICE), swept_stage.actor(ALICE)
    listener = swept_stage.listen(server, route)
    ends = swept_stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    assert swept_stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    if resetting == "client":
        client(steps.reset, ends.tcp)
        server(os.close, accepted.tcp)
    else:
        server(steps.reset, accepted.tcp)
        client(os.close, ends.tcp)
    swept_stage.wait_until_empty()


@pytest.mark.parametrize("route", [V4, V6], ids=str)
def test_a_socket_connected_to_itself_meets_nobody_else(stage: Stage, route: Route) -> None:
    client = stage.actor(ALICE)
    fds = client(steps.sockets, route, (route.target, 0))
    name = client(steps.own_name, fds.tcp)
    client(steps.connect_one, fds.tcp, name)
    assert client(steps.names, fds.tcp) == (name, name)
    with client.borrow(fds.tcp) as sock:
        try:
            peer = as_peer(stage.client.lookup(sock))
        except peercred.NotFound:
            pass
        else:
            assert peer[:2] == (client.pid, ALICE)
    client(os.close, fds.tcp)
    stage.wait_until_empty()
