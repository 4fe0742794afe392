"""What watchers are told, whatever they do; the programs' part is in tests/kernel/test_watch.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import closing

import pytest
from google.rpc import code_pb2

from harness.memory_events import MemoryEvents
from harness.memory_view import MemoryView, connection
from peercred.v1 import peer_credentials_pb2 as pb
from peercredd.records import Connection
from peercredd.service import PAGE, RequestError
from peercredd.watching import MAX_WATCHERS, QUEUE_LENGTH, Hub

Told = tuple[str, int]
Watching = AsyncGenerator[pb.WatchConnectionsResponse]


class Capture(MemoryView):
    """Connections that come and go, and what is told of them."""

    def __init__(self, events: MemoryEvents, *cookies: int) -> None:
        super().__init__(*map(connection, cookies))
        self.events = events
        self.lost = 0

    def events_lost(self) -> int:
        return self.lost

    def establish(self, *cookies: int) -> None:
        for cookie in cookies:
            self.connections[cookie] = connection(cookie)
            self.events.tell(self.connections[cookie])

    def retire(self, *cookies: int) -> None:
        for cookie in cookies:
            del self.connections[cookie]
            self.events.tell(cookie)


def everything(connection: Connection) -> Connection:
    return connection


def told(response: pb.WatchConnectionsResponse) -> list[Told]:
    return [
        (kind, getattr(event, kind).server_socket_cookie)
        for event in response.events
        if (kind := event.WhichOneof("event"))
    ]


async def present(watching: Watching) -> list[Told]:
    all_told = []
    async for response in watching:
        if response.synchronized:
            break
        all_told += told(response)
    return all_told


async def next_told(watching: Watching, count: int) -> list[Told]:
    all_told: list[Told] = []
    while len(all_told) < count:
        all_told += told(await anext(watching))
    return all_told


def run(
    scenario: Callable[[Capture, Hub], Coroutine[object, object, None]],
    *cookies: int,
    kind: type[Capture] = Capture,
) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await scenario(capture, Hub(capture, events))

    with closing(MemoryEvents()) as events:
        capture = kind(events, *cookies)
        asyncio.run(main())


def test_what_comes_and_goes_while_the_present_is_told_is_told_once_and_in_order() -> None:
    async def scenario(capture: Capture, hub: Hub) -> None:
        watching = hub.watch(everything)
        first = told(await anext(watching))
        assert first == [("present", cookie) for cookie in range(1, PAGE + 1)]
        # One that was told of, one that is yet to be, and one that has just come.
        capture.retire(1, PAGE + 1)
        capture.establish(1000)
        await asyncio.sleep(0)

        rest = await present(watching) + await next_told(watching, 1)
        everyone = first + rest
        if ("present", 1000) not in everyone and ("established", 1000) not in everyone:
            everyone += await next_told(watching, 1)
        assert ("present", PAGE + 1) not in everyone
        assert everyone.index(("retired", 1)) > everyone.index(("present", 1))
        assert sum(cookie == 1000 for _, cookie in everyone) == 1
        await watching.aclose()

    run(scenario, *range(1, 2 * PAGE))


def test_what_comes_as_the_present_is_looked_at_is_told_once() -> None:
    class Busy(Capture):
        def pages(self, size: int) -> Iterator[list[Connection]]:
            self.establish(7)
            return super().pages(size)

    async def scenario(capture: Capture, hub: Hub) -> None:
        watching = hub.watch(everything)
        assert await present(watching) == [("present", 7)]
        capture.retire(7)
        assert await next_told(watching, 1) == [("retired", 7)]
        await watching.aclose()

    run(scenario, kind=Busy)


def test_a_slow_watcher_misses_what_comes_but_never_what_ends_and_is_told_how_much() -> None:
    async def scenario(capture: Capture, hub: Hub) -> None:
        slow, quick = hub.watch(everything), hub.watch(everything)
        assert await present(slow) == await present(quick) == [("present", 1)]
        more = 50
        cookies = range(1000, 1000 + QUEUE_LENGTH + more)
        for cookie in cookies:
            capture.establish(cookie)
            assert await next_told(quick, 1) == [("established", cookie)]
        capture.retire(1, *cookies)

        kept = cookies[:QUEUE_LENGTH]
        expected = [("established", cookie) for cookie in kept]
        expected += [("retired", cookie) for cookie in (1, *kept)]
        assert await next_told(slow, len(expected)) == expected
        capture.establish(5)
        response = await anext(slow)
        assert told(response) == [("established", 5)]
        assert response.missed == more
        await slow.aclose()
        await quick.aclose()

    run(scenario, 1)


def test_to_begin_to_watch_takes_a_page_at_a_time_and_others_have_theirs() -> None:
    turns: list[int] = []

    class Counting(Capture):
        def pages(self, size: int) -> Iterator[list[Connection]]:
            for page in super().pages(size):
                turns.append(len(page))
                yield page

    async def scenario(_: Capture, hub: Hub) -> None:
        watching = hub.watch(everything)
        assert len((await anext(watching)).events) == PAGE
        assert turns == [PAGE]
        nothing = hub.watch(lambda _: None)
        beginning = asyncio.ensure_future(anext(nothing))
        await asyncio.sleep(0)
        # One page of it, and the event loop is everybody's.
        assert turns == [PAGE, PAGE]
        assert (await beginning).synchronized
        await nothing.aclose()
        await watching.aclose()

    run(scenario, *range(1, 10 * PAGE), kind=Counting)


def test_to_look_for_what_was_swept_takes_a_page_at_a_time() -> None:
    looked: list[int] = []

    class Counting(Capture):
        def has_connection(self, server_cookie: int) -> bool:
            looked.append(server_cookie)
            return super().has_connection(server_cookie)

    async def scenario(_: Capture, hub: Hub) -> None:
        watching = hub.watch(everything)
        await present(watching)
        looking = asyncio.ensure_future(hub.reconcile())
        await asyncio.sleep(0)
        assert len(looked) == PAGE
        await looking
        assert sorted(looked) == list(range(1, 10 * PAGE))
        await watching.aclose()

    run(scenario, *range(1, 10 * PAGE), kind=Counting)


def test_what_the_sweeper_takes_away_is_told_as_retired() -> None:
    async def scenario(capture: Capture, hub: Hub) -> None:
        watching = hub.watch(everything)
        await present(watching)
        capture.establish(3)
        assert await next_told(watching, 1) == [("established", 3)]
        for swept in (2, 3):
            del capture.connections[swept]

        await hub.reconcile()

        assert set(await next_told(watching, 2)) == {("retired", 2), ("retired", 3)}
        await watching.aclose()

    run(scenario, 1, 2)


def test_what_the_programs_found_no_room_for_is_said_to_be_missed() -> None:
    async def scenario(capture: Capture, hub: Hub) -> None:
        capture.lost = 100  # before anybody watched
        watching = hub.watch(everything)
        await present(watching)
        capture.lost += 7

        await hub.reconcile()

        assert (await anext(watching)).missed == 7
        await watching.aclose()

    run(scenario)


def test_the_programs_tell_only_while_somebody_watches() -> None:
    async def scenario(capture: Capture, hub: Hub) -> None:
        assert not capture.events.watched
        first, second = hub.watch(everything), hub.watch(everything)
        await present(first)
        await present(second)
        await first.aclose()
        assert capture.events.watched
        await second.aclose()
        assert not capture.events.watched

    run(scenario)


def test_what_nobody_read_the_last_time_is_not_told_the_next_time() -> None:
    async def scenario(capture: Capture, hub: Hub) -> None:
        capture.events.leave(connection(77), 77)
        watching = hub.watch(everything)
        assert await present(watching) == []
        capture.establish(5)
        assert await next_told(watching, 1) == [("established", 5)]
        await watching.aclose()

    run(scenario)


def test_a_watcher_is_told_nothing_of_what_it_filters_out() -> None:
    async def scenario(capture: Capture, hub: Hub) -> None:
        watching = hub.watch(lambda one: one if one.server_socket_cookie % 2 else None)
        assert await present(watching) == [("present", 1)]
        capture.establish(4, 5)
        capture.retire(2, 4, 5)
        assert await next_told(watching, 2) == [("established", 5), ("retired", 5)]
        await watching.aclose()

    run(scenario, 1, 2)


def test_too_many_watchers_are_refused_and_one_that_leaves_makes_room() -> None:
    async def scenario(_: Capture, hub: Hub) -> None:
        watchers = [hub.watch(everything) for _ in range(MAX_WATCHERS)]
        for watching in watchers:
            await present(watching)
        with pytest.raises(RequestError) as refused:
            await anext(hub.watch(everything))
        assert refused.value.status.code == code_pb2.RESOURCE_EXHAUSTED
        await watchers.pop().aclose()
        late = hub.watch(everything)
        await present(late)
        for watching in (*watchers, late):
            await watching.aclose()

    run(scenario)
