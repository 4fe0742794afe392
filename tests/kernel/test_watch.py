"""Those who watch are told of every connection that comes and goes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from itertools import takewhile

import pytest

from harness import steps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon, drops, open_map
from harness.routes import V4
from harness.stage import Listener, Stage
from harness.users import ALICE, BOB, SERVICE
from peercred import ConnectionEvent, EventKind
from peercredd.records import CONNECTION_SIZE

pytestmark = pytest.mark.kernel

ESTABLISHED, RETIRED = EventKind.ESTABLISHED, EventKind.RETIRED


def watching(stage: Stage, listener: Listener, uid: int | None = None) -> Iterator[ConnectionEvent]:
    """What a watcher of that listener is told from now on; what is present comes at once."""
    return stage.client.watch(server_port=listener.addresses.tcp[1], client_uid=uid)


def present(events: Iterator[ConnectionEvent]) -> list[ConnectionEvent]:
    return list(takewhile(lambda event: event.kind is not EventKind.SYNCHRONIZED, events))


def told(event: ConnectionEvent) -> tuple[EventKind, int]:
    assert event.connection
    return event.kind, event.connection.client.uid


def test_what_is_present_comes_first_and_is_what_a_list_has(stage: Stage) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    stage.connect(client, listener)
    server(steps.accept, listener.fds)
    port = listener.addresses.tcp[1]

    (event,) = present(watching(stage, listener))

    assert event.kind is EventKind.PRESENT
    assert [event.connection] == list(stage.client.connections(server_port=port))


def test_a_connection_is_told_as_it_is_established_and_as_it_is_retired(stage: Stage) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    events = watching(stage, listener)
    assert present(events) == []

    ends = stage.connect(client, listener)
    came = next(events)
    accepted = server(steps.accept, listener.fds)
    answer = stage.answer(server, accepted.tcp)
    client(steps.close, ends)
    server(steps.close, accepted)
    went = next(events)

    assert told(came) == (ESTABLISHED, ALICE)
    assert came.connection
    assert came.connection.client.pid == client.pid
    assert came.connection.listener
    assert came.connection.listener.pid == server.pid
    assert came.connection.server_socket_cookie == answer.server_socket_cookie
    assert went.kind is RETIRED
    assert went.connection == came.connection


def test_what_was_present_is_told_when_it_is_retired(stage: Stage) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    events = watching(stage, listener)
    (before,) = present(events)

    client(steps.close, ends)
    server(steps.close, accepted)
    went = next(events)

    assert (went.kind, went.connection) == (RETIRED, before.connection)


def test_connections_that_are_over_at_once_are_told_in_their_order(stage: Stage) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    events = watching(stage, listener)
    present(events)

    count = 200
    for _ in range(count):
        client(steps.close, stage.connect(client, listener))
        server(steps.close, server(steps.accept, listener.fds))

    there: set[int] = set()
    seen = 0
    while seen < count or there:
        event = next(events)
        assert event.connection
        cookie = event.connection.server_socket_cookie
        if event.kind is ESTABLISHED:
            assert cookie not in there
            there.add(cookie)
            seen += 1
        else:
            assert event.kind is RETIRED
            there.remove(cookie)


def test_others_connections_are_left_out_where_a_filter_says_so(stage: Stage) -> None:
    server, other, client = stage.actor(SERVICE), stage.actor(BOB), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    events = watching(stage, listener, uid=ALICE)
    present(events)

    for actor in (other, client):
        client_ends = stage.connect(actor, listener)
        actor(steps.close, client_ends)
        server(steps.close, server(steps.accept, listener.fds))

    assert [told(next(events)) for _ in range(2)] == [(ESTABLISHED, ALICE), (RETIRED, ALICE)]


def test_several_watchers_are_told_the_same(stage: Stage) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    watchers = [watching(stage, listener) for _ in range(3)]
    assert [present(events) for events in watchers] == [[], [], []]

    client(steps.close, stage.connect(client, listener))
    server(steps.close, server(steps.accept, listener.fds))

    first, *others = ([next(events), next(events)] for events in watchers)
    assert [told(event) for event in first] == [(ESTABLISHED, ALICE), (RETIRED, ALICE)]
    assert others == [first, first]


def test_what_the_daemon_could_not_be_told_is_counted_and_said(hook_set: str) -> None:
    with (
        Cgroup() as cgroup,
        Daemon(cgroup, hook_set) as daemon,
        daemon.client() as client,
        Origin(cgroup) as origin,
        Stage(origin, client) as stage,
    ):
        server = stage.actor(SERVICE)
        events = client.watch()
        present(events)
        with closing(open_map(daemon, "events")) as ring:
            too_many = ring.max_entries // CONNECTION_SIZE + 1
        # One that is silent for half a minute is replaced.
        reader = client.status().server_pid
        os.kill(reader, signal.SIGSTOP)
        try:
            server(steps.talk_to_oneself, V4, too_many)
        finally:
            os.kill(reader, signal.SIGCONT)

        missed = next(event for event in events if event.kind is EventKind.MISSED)
        lost = drops(client)["EVENT_LOST"]
        assert lost > 0
        assert 0 < missed.missed <= lost + too_many
