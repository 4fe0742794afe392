"""Telling those who watch: what is there, then what comes and goes.

Everybody is told out of one ring buffer, read as long as somebody watches. A watcher
that reads slowly misses what was established meanwhile, and is told how much that was;
it keeps nobody waiting, and holds no more than QUEUE_LENGTH connections in memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import structlog
from google.rpc import code_pb2

from peercred.v1 import peer_credentials_pb2 as pb
from peercredd import encode
from peercredd.events import Event
from peercredd.libbpf import KernelError
from peercredd.records import Connection
from peercredd.service import PAGE, RequestError

MAX_WATCHERS = 32
"""Beyond it calls fail with RESOURCE_EXHAUSTED."""

MAX_LIMITED_WATCHERS = 16
"""Of these, who see only what is their own."""

QUEUE_LENGTH = 2000
"""Connections that wait for a slow watcher."""

RECONCILE_SECONDS = 10.0
"""How often it is looked for what nobody has told of: what the sweeper took away."""

log = structlog.get_logger()

Shown = Callable[[Connection], Connection | None]
"""Makes of a connection what a watcher is to be shown of it, or None."""


class Source(Protocol):
    """What is told of; the Store is one."""

    def pages(self, size: int) -> Iterator[Iterable[Connection]]:
        """Yield all connections, about so many at a time."""

    def has_connection(self, server_cookie: int) -> bool:
        """Return whether a server socket has a record."""

    def events_lost(self) -> int:
        """Return how many events the programs found no room for."""


class Told(Protocol):
    """What the programs tell; `events.Events` is one."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is something to read."""

    def watch(self, wanted: bool) -> None:
        """Have the programs tell, or no more."""

    def read(self) -> Iterator[Event]:
        """Return what was told since the last time; there may be more."""


class Hub:
    """Tells any number of watchers, in the event loop it is used in."""

    def __init__(self, source: Source, events: Told) -> None:
        self._source = source
        self._events = events
        self._watchers: set[_Watcher] = set()
        self._reconciling: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._lost = 0

    async def watch(
        self, shown: Shown, *, sees_all: bool = True
    ) -> AsyncGenerator[pb.WatchConnectionsResponse]:
        """Yield the connections that are `shown`, in responses of at most PAGE events; never ends.

        Who does not see all is told that the programs lost something, and not how much.

        Raises:
            RequestError: too many watch already.
        """
        with self._joined(_Watcher(shown, sees_all)) as watcher:
            # What happens from here on waits in the watcher's queue.
            for found in self._source.pages(PAGE):
                page = pb.WatchConnectionsResponse()
                for connection in found:
                    if news := watcher.news(connection):
                        encode.connection(page.events.add().present, news)
                if page.events:
                    yield page
                # One page of all who begin to watch, then everybody else has the event loop.
                async with self._turn:
                    await asyncio.sleep(0)
            yield pb.WatchConnectionsResponse(synchronized=True)
            while True:
                yield await watcher.next()

    @contextmanager
    def _joined(self, watcher: _Watcher) -> Iterator[_Watcher]:
        limited = sum(not each.sees_all for each in self._watchers)
        if len(self._watchers) >= MAX_WATCHERS or (
            not watcher.sees_all and limited >= MAX_LIMITED_WATCHERS
        ):
            raise RequestError(
                encode.error(
                    code_pb2.RESOURCE_EXHAUSTED,
                    "TOO_MANY_WATCHERS",
                    "as many watch already as may; ask again when one of them has ended",
                )
            )
        if not self._watchers:
            self._begin()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)
            if not self._watchers:
                self._end()

    def _begin(self) -> None:
        # What is left from the last time is older than the state that comes first.
        while any(True for _ in self._events.read()):
            pass
        self._lost = self._source.events_lost()
        self._events.watch(True)
        asyncio.get_running_loop().add_reader(self._events.fileno(), self._tell)
        self._reconciling = asyncio.create_task(self._reconcile_at_intervals())

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._events.fileno())
        self._events.watch(False)
        if self._reconciling:
            self._reconciling.cancel()

    def _tell(self) -> None:
        for event in self._events.read():
            for watcher in self._watchers:
                watcher.tell(event)

    async def _reconcile_at_intervals(self) -> None:
        while True:
            await asyncio.sleep(RECONCILE_SECONDS)
            try:
                await self.reconcile()
            except KernelError as error:
                log.warning("watchers may miss what was retired", reason=error.strerror)

    async def reconcile(self) -> None:
        """Tell what no program has told, or found no room to tell.

        Raises:
            KernelError: the kernel gives no answer.
        """
        lost = self._source.events_lost()
        known: set[int] = set()
        for watcher in self._watchers:
            missed = lost - self._lost
            watcher.has_missed(missed if watcher.sees_all else min(missed, 1))
            known |= watcher.known
        self._lost = lost
        for number, cookie in enumerate(known, 1):
            if not self._source.has_connection(cookie):
                for watcher in self._watchers:
                    watcher.tell(cookie)
            if number % PAGE == 0:
                await asyncio.sleep(0)


class _Watcher:
    """One of them: what it knows of, and what waits for it."""

    def __init__(self, shown: Shown, sees_all: bool) -> None:
        self.known: set[int] = set()
        """Cookies of the connections that it was told of, but not that they were retired."""
        self.sees_all = sees_all
        self._shown = shown
        self._queue: deque[Event] = deque()
        self._connections = 0
        """How many in the queue are no mere cookies."""
        self._missed = 0
        self._news = asyncio.Event()

    def news(self, connection: Connection) -> Connection | None:
        """What it is to be told of a connection, if anything; it is known from then on."""
        cookie = connection.server_socket_cookie
        if cookie in self.known or (shown := self._shown(connection)) is None:
            return None
        self.known.add(cookie)
        return shown

    def tell(self, event: Event) -> None:
        """Put in the queue what it is to be told."""
        if isinstance(event, int):
            if event not in self.known:
                return
            self.known.remove(event)
        elif self._connections >= QUEUE_LENGTH:
            if self._shown(event):
                self.has_missed(1)
            return
        else:
            news = self.news(event)
            if news is None:
                return
            self._connections += 1
            event = news
        self._queue.append(event)
        self._news.set()

    def has_missed(self, count: int) -> None:
        """Have it told that there were so many more."""
        if count:
            self._missed += count
            self._news.set()

    async def next(self) -> pb.WatchConnectionsResponse:
        """Return what waits, at most PAGE events of it, and wait if nothing does."""
        await self._news.wait()
        response = pb.WatchConnectionsResponse(missed=self._missed)
        while self._queue and len(response.events) < PAGE:
            event = self._queue.popleft()
            if isinstance(event, int):
                response.events.add().retired.server_socket_cookie = event
            else:
                self._connections -= 1
                encode.connection(response.events.add().established, event)
        if not self._queue:
            self._news.clear()
        return response
