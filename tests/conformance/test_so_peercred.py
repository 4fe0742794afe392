"""getsockopt() of a TCP socket says of its peer what that of a unix socket says.

That it does in every scenario of this folder is checked wherever a `Stage` is asked for a
peer, or for the reason why there is none. Here is what the calls themselves promise.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

import pytest

from harness import so_peercred, steps
from harness.actors import Actor, Origin
from harness.cgroup import Cgroup
from harness.routes import V4
from harness.so_peercred import (
    MAX_GROUPS,
    NOBODY,
    SO_PEERGROUPS,
    UCRED_SIZE,
    Told,
    as_told_by_tcp,
    getsockopt,
)
from harness.stage import Stage
from harness.steps import Both, Route
from harness.users import ALICE, BOB, SERVICE

pytestmark = pytest.mark.kernel

LENGTHS = (*range(UCRED_SIZE + 3), 16, 64, 4095, 4096, 4097, 70_000)
GROUPS = (7, 8, 9)
FAST_OPEN = 0x607
"""net.ipv4.tcp_fastopen: both ends may, without a cookie."""


def ask(actor: Actor, fds: Both[int], option: int, length: int, room: int = -1) -> Both[Told]:
    """The same call on both transports."""
    with actor.borrow(fds.unix) as unix, actor.borrow(fds.tcp) as tcp:
        return Both(
            *(getsockopt(each, socket.SOL_SOCKET, option, length, room) for each in (unix, tcp))
        )


def accepted_from(stage: Stage, groups: tuple[int, ...]) -> tuple[Actor, Both[int]]:
    """A server, and what it accepted from somebody in these groups."""
    server, client = stage.actor(SERVICE), stage.actor(ALICE, groups=groups)
    listener = stage.listen(server, V4)
    stage.connect(client, listener)
    return server, server(steps.accept, listener.fds)


def test_both_ends_name_the_other_and_a_listener_itself(stage: Stage, route: Route) -> None:
    server, client = stage.actor(SERVICE, groups=GROUPS), stage.actor(ALICE, groups=(ALICE, BOB))
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)
    with server.borrow(listener.fds.unix) as unix, server.borrow(listener.fds.tcp) as tcp:
        itself = so_peercred.peer(unix)
        assert so_peercred.tcp_peer(tcp) == so_peercred.as_told_by_tcp(itself)
    assert itself[:2] == (server.pid, SERVICE)


def test_a_buffer_of_any_length_gets_as_much_as_from_a_unix_socket(stage: Stage) -> None:
    server, accepted = accepted_from(stage, GROUPS)
    for length in LENGTHS:
        unix, tcp = ask(server, accepted, socket.SO_PEERCRED, length)
        assert tcp == unix


def test_no_buffer_and_no_sensible_length_fail_as_on_a_unix_socket(stage: Stage) -> None:
    server, accepted = accepted_from(stage, GROUPS)
    for length in (-1, 0, 12, 64):
        unix, tcp = ask(server, accepted, socket.SO_PEERCRED, length, room=0)
        assert tcp == unix
        assert unix.errno or length == 0


def test_groups_that_fit_are_given_as_by_a_unix_socket(stage: Stage) -> None:
    server, accepted = accepted_from(stage, GROUPS)
    for length in (12, 13, 16, 128, 4096, 70_000):
        unix, tcp = ask(server, accepted, SO_PEERGROUPS, length)
        assert tcp == unix
        assert tcp[:2] == (0, 4 * len(GROUPS))


def test_groups_that_do_not_fit_are_not_given(stage: Stage) -> None:
    server, accepted = accepted_from(stage, GROUPS)
    for length in (0, 1, 4, 11):
        unix, tcp = ask(server, accepted, SO_PEERGROUPS, length)
        assert (unix.errno, unix.length) == (errno.ERANGE, 4 * len(GROUPS))
        # The kernel lets nobody who makes a call fail say how much it would have taken.
        assert (tcp.errno, tcp.length) == (errno.ERANGE, length)
        assert tcp.buffer == unix.buffer


def test_groups_without_a_buffer_are_counted_where_a_unix_socket_fails(stage: Stage) -> None:
    server, accepted = accepted_from(stage, GROUPS)
    for length in (12, 64):
        unix, tcp = ask(server, accepted, SO_PEERGROUPS, length, room=0)
        assert unix == (errno.EFAULT, length, b"")
        # The program is not told whether there is one.
        assert tcp == (0, 4 * len(GROUPS), b"")


def test_as_many_groups_as_are_recorded_are_given(stage: Stage) -> None:
    server, accepted = accepted_from(stage, tuple(range(1, MAX_GROUPS + 1)))
    unix, tcp = ask(server, accepted, SO_PEERGROUPS, 4 * MAX_GROUPS)
    assert tcp == unix
    assert tcp.errno == 0


@pytest.mark.parametrize("groups", [(), tuple(range(1, MAX_GROUPS + 2))], ids=["none", "too many"])
def test_no_groups_and_too_many_are_no_data_and_never_a_part(
    stage: Stage, groups: tuple[int, ...]
) -> None:
    server, accepted = accepted_from(stage, groups)
    for length in (0, 4, 4 * MAX_GROUPS, 1024):
        _, tcp = ask(server, accepted, SO_PEERGROUPS, length)
        assert tcp == Told(errno.ENODATA, length, b"\xa5" * length)


def test_a_socket_that_is_no_connections_end_has_no_peer(stage: Stage) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    ends = client(steps.sockets, V4)
    assert client(steps.tcp_peer, ends.tcp) == (NOBODY, None)
    client(steps.connect, ends, listener.addresses)
    server(steps.accept, listener.fds)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)
    client(steps.disconnect, ends.tcp)
    assert client(steps.tcp_peer, ends.tcp) == (NOBODY, None)


def again_a_client(stage: Stage, was: Both[int], client: Actor, route: Route) -> None:
    server = stage.actor(BOB)
    listener = stage.listen(server, route)
    ends = Both(client(steps.unix_socket), was.tcp)
    client(steps.connect, ends, listener.addresses)
    assert stage.peer(client, ends)[:2] == (server.pid, BOB)


def a_client_that_has_only_promised(
    stage: Stage, was: Both[int], client: Actor, route: Route
) -> None:
    server = stage.actor(BOB)
    listener = stage.listen(server, route)
    client(steps.defer, was.tcp, listener.addresses.tcp)
    assert client(steps.tcp_peer, was.tcp) == (NOBODY, None)
    ends = Both(client(steps.unix_socket), was.tcp)
    client(steps.connect_one, ends.unix, listener.addresses.unix)
    client(steps.write, ends)
    assert stage.peer(client, ends)[:2] == (server.pid, BOB)


def a_listener(stage: Stage, was: Both[int], client: Actor, route: Route) -> None:
    fds = Both(client(steps.bind, route).unix, was.tcp)
    client(steps.listen, fds)
    assert client(steps.tcp_peer, fds.tcp) == as_told_by_tcp(client(steps.peer, fds.unix))
    other = stage.actor(BOB)
    theirs = other(steps.sockets, route)
    other(steps.connect, theirs, client(steps.addresses, fds, route))
    assert stage.peer(client, client(steps.accept, fds))[:2] == (other.pid, BOB)
    assert stage.peer(other, theirs)[:2] == (client.pid, ALICE)


@pytest.mark.parametrize("becomes", [again_a_client, a_client_that_has_only_promised, a_listener])
def test_whom_a_client_was_told_of_is_not_its_sockets_next_peer(
    stage: Stage, route: Route, becomes: Callable[[Stage, Both[int], Actor, Route], None]
) -> None:
    namespace = stage.place = stage.namespace()
    namespace.sysctl("net.ipv4.tcp_fastopen", FAST_OPEN)
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    server(steps.accept, listener.fds)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)
    client(steps.disconnect, ends.tcp)
    assert client(steps.tcp_peer, ends.tcp) == (NOBODY, None)

    becomes(stage, ends, client, route)


def test_a_client_is_told_the_same_whatever_becomes_of_its_server(
    stage: Stage, route: Route
) -> None:
    server, client = stage.actor(SERVICE, groups=GROUPS), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    expected = client(steps.peer, ends.unix)
    assert client(steps.tcp_peer, ends.tcp) == as_told_by_tcp(expected)
    accepted = server(steps.accept, listener.fds)
    server(steps.reset, accepted.tcp)
    client(steps.wait_until_hung_up, ends.tcp)
    server.exit()
    assert client(steps.tcp_peer, ends.tcp) == as_told_by_tcp(expected)
    assert expected[:2] == (server.pid, SERVICE)


def test_whoever_holds_the_socket_is_told_the_same(stage: Stage) -> None:
    server, accepted = accepted_from(stage, GROUPS)
    with Cgroup() as elsewhere, Origin(elsewhere) as origin:
        other = origin.actor()
        (given,) = server.give((accepted.tcp,), to=other)
        assert other(steps.tcp_peer, given) == server(steps.tcp_peer, accepted.tcp)
        other.close()


def test_a_socket_made_elsewhere_is_not_answered_here(stage: Stage) -> None:
    with Cgroup() as elsewhere, Origin(elsewhere) as origin:
        server = origin.actor()
        client = stage.actor(ALICE)
        listener = stage.listen(server, V4)
        stage.connect(client, listener)
        accepted = server(steps.accept, listener.fds)
        (given,) = server.give((accepted.tcp,), to=client)
        assert client(steps.tcp_peer, given) == (NOBODY, None)
        server.close()


def test_the_answer_outlives_client_and_listener(stage: Stage) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE, groups=GROUPS)
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    expected = server(steps.peer, accepted.unix)
    server(steps.close, listener.fds)
    client(steps.close, ends)
    pid = client.pid
    client.close()
    assert server(steps.tcp_peer, accepted.tcp) == so_peercred.as_told_by_tcp(expected)
    assert (expected.pid, expected.uid) == (pid, ALICE)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
