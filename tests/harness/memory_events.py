"""A ring buffer held in memory: what watchers are told from, without a kernel."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator

from peercredd.events import Event


class MemoryEvents:
    """What `peercredd.events.Events` does, out of a queue. Safe to use from several threads."""

    def __init__(self) -> None:
        self.watched = False
        self._queue: deque[Event] = deque()
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def tell(self, *events: Event) -> None:
        """Do as the programs do."""
        if self.watched:
            self.leave(*events)

    def leave(self, *events: Event) -> None:
        """Put events there that nobody has read while somebody watched."""
        self._queue.extend(events)
        os.eventfd_write(self._news, 1)

    def fileno(self) -> int:
        return self._news

    def watch(self, wanted: bool) -> None:
        self.watched = wanted

    def read(self) -> Iterator[Event]:
        try:
            os.eventfd_read(self._news)
        except BlockingIOError:
            return
        while self._queue:
            yield self._queue.popleft()

    def close(self) -> None:
        os.close(self._news)
