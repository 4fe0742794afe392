"""What both clients make of the events that a daemon sends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.canned_daemon import CannedDaemon
from peercred import (
    AsyncClient,
    Client,
    ConnectionEvent,
    DeadlineExceeded,
    EventKind,
    InvalidArgument,
    PeerCredError,
    Unavailable,
)
from peercred.v1 import peer_credentials_pb2 as pb

Watch = Callable[[CannedDaemon], list[ConnectionEvent]]
SYNCHRONIZED = pb.WatchConnectionsResponse(synchronized=True)


def blocking(canned: CannedDaemon, timeout: float = 60) -> list[ConnectionEvent]:
    """What the blocking client is told before the daemon ends the call."""
    events: list[ConnectionEvent] = []
    with Client(canned.address, timeout=timeout) as client:
        try:
            events += client.watch()
        except Unavailable:
            return events
    raise AssertionError("a daemon that ends the call is an error")


def in_a_loop(canned: CannedDaemon, timeout: float = 60) -> list[ConnectionEvent]:
    """The same for the asyncio client."""
    events = []

    async def watch() -> None:
        async with AsyncClient(canned.address, timeout=timeout) as client:
            async for event in client.watch():
                events.append(event)  # noqa: PERF401 - those before the error count, too

    with pytest.raises(Unavailable):
        asyncio.run(watch())
    return events


both = pytest.mark.parametrize("watch", [blocking, in_a_loop])


@pytest.fixture
def canned(tmp_path: Path) -> Iterator[CannedDaemon]:
    with CannedDaemon(f"unix:{tmp_path}/s") as canned:
        yield canned


def one(cookie: int) -> pb.Connection:
    return pb.Connection(
        server_socket_cookie=cookie,
        client_socket_cookie=31,
        netns_cookie=1,
        client_endpoint=pb.Endpoint(address="127.0.0.1", port=50001),
        server_endpoint=pb.Endpoint(address="127.0.0.1", port=8080),
        client=pb.Credentials(pid=7, uid=1000, gid=1000),
    )


def comes(cookie: int) -> pb.ConnectionEvent:
    return pb.ConnectionEvent(established=one(cookie))


def goes(cookie: int) -> pb.ConnectionEvent:
    return pb.ConnectionEvent(retired=pb.ConnectionEvent.Retired(server_socket_cookie=cookie))


@both
def test_an_event_that_ends_a_connection_has_what_was_told_of_it_first(
    canned: CannedDaemon, watch: Watch
) -> None:
    canned.watched = [
        pb.WatchConnectionsResponse(events=[pb.ConnectionEvent(present=one(1))]),
        SYNCHRONIZED,
        pb.WatchConnectionsResponse(events=[comes(2), goes(1)]),
    ]

    events = watch(canned)

    assert [event.kind for event in events] == [
        EventKind.PRESENT,
        EventKind.SYNCHRONIZED,
        EventKind.ESTABLISHED,
        EventKind.RETIRED,
    ]
    assert events[3].connection == events[0].connection
    assert events[0].connection
    assert events[0].connection.server_socket_cookie == 1


@both
def test_what_is_missed_is_told_once_each_time_it_is_more(
    canned: CannedDaemon, watch: Watch
) -> None:
    canned.watched = [SYNCHRONIZED] + [
        pb.WatchConnectionsResponse(events=[comes(cookie)], missed=missed)
        for cookie, missed in enumerate((0, 3, 3, 5))
    ]

    missed = [event.missed for event in watch(canned) if event.kind is EventKind.MISSED]

    assert missed == [3, 5]


@pytest.mark.parametrize("event", [goes(9), pb.ConnectionEvent()])
def test_what_makes_no_sense_is_an_error_and_not_an_event(
    canned: CannedDaemon, event: pb.ConnectionEvent
) -> None:
    canned.watched = [SYNCHRONIZED, pb.WatchConnectionsResponse(events=[event])]

    with (
        Client(canned.address) as client,
        pytest.raises(PeerCredError, match=r"tells of|told of"),
    ):
        list(client.watch())


def test_a_daemon_that_does_not_tell_what_is_present_is_given_up(canned: CannedDaemon) -> None:
    canned.release.clear()

    with Client(canned.address, timeout=0.2) as client, pytest.raises(DeadlineExceeded):
        list(client.watch())


def test_nothing_may_happen_for_longer_than_the_timeout(canned: CannedDaemon) -> None:
    canned.watched = [SYNCHRONIZED]
    canned.release.clear()

    with Client(canned.address, timeout=0.2) as client:
        events = client.watch()
        assert next(events).kind is EventKind.SYNCHRONIZED
        assert canned.waiting.wait(60)
        # Longer than that it would not have waited for what is present.
        with pytest.raises(DeadlineExceeded):
            list(client.connections())
        canned.release.set()
        with pytest.raises(Unavailable):
            next(events)


def test_a_filter_out_of_its_range_is_refused_before_anything_is_asked(
    canned: CannedDaemon,
) -> None:
    with Client(canned.address) as client, pytest.raises(InvalidArgument, match="client_uid"):
        client.watch(client_uid=-1)
