"""Who accepted a connection: told beside the answer, and never instead of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from harness import steps
from harness.actors import Actor
from harness.io_uring import Mode
from harness.routes import MULTIPATH, V4
from harness.stage import Stage
from harness.steps import AcceptByRing, Both, Route
from harness.users import ALICE, BOB, CAROL, DAVE, SERVICE

pytestmark = pytest.mark.kernel


def check(
    stage: Stage,
    listening: Actor,
    acceptor: Actor,
    uid: int,
    accepted: Both[int],
    client: Actor,
    ends: Both[int],
) -> None:
    """SERVICE listened, ALICE connected, and somebody else accepted: all at once and from all."""
    assert stage.peer(acceptor, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (listening.pid, SERVICE)
    expected = stage.told(acceptor, uid)
    assert stage.acceptor(acceptor, accepted.tcp) == expected
    assert stage.acceptor(client, ends.tcp) == expected
    server_cookie = stage.answer(client, ends.tcp).server_socket_cookie
    (listed,) = (
        each
        for each in stage.client.connections(client_uid=ALICE)
        if each.server_socket_cookie == server_cookie
    )
    assert listed.listener
    assert (listed.client.pid, listed.listener.pid) == (client.pid, listening.pid)
    assert listed.acceptor == stage.answer(client, ends.tcp).acceptor


def test_workers_that_inherit_a_listener_accept_each_as_who_it_is(
    stage: Stage, route: Route
) -> None:
    master, client = stage.actor(), stage.actor(ALICE)
    master(os.seteuid, SERVICE)
    listener = stage.listen(master, route)
    master(os.seteuid, 0)
    workers = {stage.fork(master): uid for uid in (BOB, CAROL, DAVE)}
    for worker, uid in workers.items():
        worker(steps.become, uid)
        ends = stage.connect(client, listener)
        accepted = worker(steps.accept, listener.fds)
        check(stage, master, worker, uid, accepted, client, ends)


def test_a_service_that_is_given_its_listener_accepts_as_itself(stage: Stage, route: Route) -> None:
    manager, client = stage.actor(), stage.actor(ALICE)
    manager(os.seteuid, SERVICE)
    listener = stage.listen(manager, route)
    manager(os.seteuid, 0)
    ends = stage.connect(client, listener)
    service = stage.fork(manager)
    service(steps.become, CAROL)
    service.execute(kept=listener.fds)
    accepted = service(steps.accept, listener.fds)
    check(stage, manager, service, CAROL, accepted, client, ends)


def test_a_service_started_for_one_connection_did_not_accept_it(stage: Stage, route: Route) -> None:
    manager, client = stage.actor(), stage.actor(ALICE)
    manager(os.seteuid, SERVICE)
    listener = stage.listen(manager, route)
    ends = stage.connect(client, listener)
    accepted = manager(steps.accept, listener.fds)
    manager(os.seteuid, 0)
    service = stage.fork(manager)
    service(steps.become, CAROL)
    service.execute(kept=accepted)
    assert stage.peer(service, accepted)[:2] == (client.pid, ALICE)
    assert stage.acceptor(service, accepted.tcp) == stage.told(manager, SERVICE)
    assert stage.acceptor(client, ends.tcp) == stage.told(manager, SERVICE)


def test_whoever_is_handed_a_listener_and_accepts_is_the_acceptor(
    stage: Stage, route: Route
) -> None:
    server, heir, client = stage.actor(SERVICE), stage.actor(BOB), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    accepted = heir(steps.accept, Both(*server.give(listener.fds, to=heir)))
    check(stage, server, heir, BOB, accepted, client, ends)


def test_a_thread_with_ids_of_its_own_accepts_under_them(stage: Stage, route: Route) -> None:
    server, client = stage.actor(), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    tid, accepted = server(steps.in_thread, (BOB, CAROL, ()), steps.accept_one, listener.fds.tcp)
    assert stage.acceptor(client, ends.tcp) == stage.told(server, BOB)
    assert stage.answer(server, accepted).uid == ALICE
    if acceptor := stage.answer(server, accepted).acceptor:
        assert (acceptor.tid, acceptor.gid) == (tid, CAROL)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(steps.accept_without_flags, id="accept"),
        pytest.param(steps.accept_one, id="accept4"),
        pytest.param(steps.accept_nonblocking, id="non-blocking"),
        *(pytest.param(AcceptByRing(mode), id=f"io_uring {mode.name.lower()}") for mode in Mode),
    ],
)
@pytest.mark.parametrize("waits", [False, True], ids=["queued", "waited for"])
def test_however_it_accepts_the_acceptor_is_known(
    stage: Stage, route: Route, how: Callable[[int], int], waits: bool
) -> None:
    server, worker, client = stage.actor(SERVICE), stage.actor(BOB), stage.actor(ALICE)
    listener = stage.listen(server, route)
    theirs = Both(*server.give(listener.fds, to=worker))
    if waits:
        call = worker.start(how, theirs.tcp)
        ends = stage.connect(client, listener)
        accepted = Both(server(steps.accept_one, listener.fds.unix), call.result())
        (unix,) = server.give([accepted.unix], to=worker)
        accepted = Both(unix, accepted.tcp)
    else:
        ends = stage.connect(client, listener)
        accepted = Both(worker(steps.accept_one, theirs.unix), worker(how, theirs.tcp))
    check(stage, server, worker, BOB, accepted, client, ends)


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
def test_an_accept_through_io_uring_is_whose_credentials_it_ran_under(
    stage: Stage, mode: Mode
) -> None:
    server, client = stage.actor(), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    stage.connect(client, listener)
    accepted = server(AcceptByRing(mode, BOB), listener.fds.tcp)
    assert stage.acceptor(server, accepted) == stage.told(server, BOB)


def test_before_accept_nobody_has_accepted(stage: Stage, route: Route) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)
    assert stage.acceptor(client, ends.tcp) is None
    server(steps.accept, listener.fds)
    assert stage.acceptor(client, ends.tcp) == stage.told(server, SERVICE)


def test_the_acceptor_stays_known_whatever_becomes_of_it(stage: Stage, route: Route) -> None:
    server, worker, heir, client = (stage.actor(uid) for uid in (SERVICE, 0, CAROL, ALICE))
    listener = stage.listen(server, route)
    worker(os.seteuid, BOB)
    theirs = Both(*server.give(listener.fds, to=worker))
    ends = stage.connect(client, listener)
    accepted = worker(steps.accept, theirs)
    worker(os.seteuid, 0)
    handed = Both(*worker.give(accepted, to=heir))
    worker.exit()
    assert stage.peer(heir, handed)[:2] == (client.pid, ALICE)
    assert stage.acceptor(heir, handed.tcp) == stage.told(worker, BOB)
    assert stage.acceptor(client, ends.tcp) == stage.told(worker, BOB)


@pytest.mark.parametrize("end", [steps.reset_delivered, os.close], ids=["reset", "closed"])
def test_what_its_client_has_ended_is_accepted_by_whoever_does(
    stage: Stage, route: Route, end: Callable[[int], None]
) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    client(end, stage.connect(client, listener).tcp)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.acceptor(server, accepted.tcp) == stage.told(server, SERVICE)


def test_each_generation_of_a_tuple_has_the_acceptor_it_had(stage: Stage, route: Route) -> None:
    stage.place = stage.namespace()  # where nobody else takes the port
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    played = []
    local: Any = (route.target, 0)
    for uid in (BOB, CAROL, DAVE):
        worker = stage.actor(uid)
        theirs = Both(*server.give(listener.fds, to=worker))
        ends = stage.connect(client, listener, local=local)
        accepted = worker(steps.accept, theirs)
        local = client(steps.own_name, ends.tcp)[:2]
        client(steps.reset, ends.tcp)
        worker(steps.wait_until_hung_up, accepted.tcp)
        played.append((worker, uid, accepted))
    for worker, uid, accepted in played:
        assert stage.acceptor(worker, accepted.tcp) == stage.told(worker, uid)


def test_the_child_of_a_fast_open_has_its_acceptor(stage: Stage, route: Route) -> None:
    namespace = stage.namespace()
    namespace.sysctl("net.ipv4.tcp_fastopen", 0x607)
    server = stage.actor(SERVICE, namespace=namespace)
    worker = stage.actor(BOB, namespace=namespace)
    client = stage.actor(ALICE, namespace=namespace)
    listener = stage.listen(server, route)
    theirs = Both(*server.give(listener.fds, to=worker))
    ends = stage.connect(client, listener, steps.connect_fast_open)
    assert client(steps.tcp_info, ends.tcp)[1] & steps.TCPI_OPT_SYN_DATA
    accepted = worker(steps.accept, theirs)
    check(stage, server, worker, BOB, accepted, client, ends)


def test_the_child_of_a_syn_cookie_has_its_acceptor(stage: Stage, route: Route) -> None:
    namespace = stage.namespace()
    namespace.sysctl("net.ipv4.tcp_syncookies", 2)
    server = stage.actor(SERVICE, namespace=namespace)
    client = stage.actor(ALICE, namespace=namespace)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    assert namespace.counter("TcpExt", "SyncookiesRecv")
    accepted = server(steps.accept, listener.fds)
    check(stage, server, server, SERVICE, accepted, client, ends)


def test_a_connection_accepted_at_its_first_byte_has_its_acceptor(
    stage: Stage, route: Route
) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route, options=(steps.DEFER_ACCEPT,))
    ends = stage.connect(client, listener)
    client(steps.write, ends)
    accepted = server(steps.accept, listener.fds)
    check(stage, server, server, SERVICE, accepted, client, ends)


@pytest.mark.parametrize("route", MULTIPATH, ids=str)
def test_a_multipath_connection_has_its_acceptor(swept_stage: Stage, route: Route) -> None:
    stage = swept_stage
    server, worker, client = stage.actor(SERVICE), stage.actor(BOB), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    accepted = worker(steps.accept, Both(*server.give(listener.fds, to=worker)))
    assert stage.peer(worker, accepted)[:2] == (client.pid, ALICE)
    assert stage.acceptor(worker, accepted.tcp) == stage.told(worker, BOB)
    assert stage.acceptor(client, ends.tcp) == stage.told(worker, BOB)
