"""The connections that are established and retired, as the BPF programs tell of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self, TypeAlias

from peercredd import pins, records
from peercredd.libbpf import Map, RingBuffer, get_pinned
from peercredd.records import Connection

_KEY = bytes(4)

Event: TypeAlias = Connection | int
"""A connection that was established, or the server socket's cookie of one that was retired."""


class Events:
    """What is told from the moment on that somebody watches; one reader at a time.

    What the programs find no room for is counted as the drop EVENT_LOST.
    """

    def __init__(self, pin_dir: Path) -> None:
        """Open the ring buffer of the capture in `pin_dir`. Nobody watches then.

        Raises:
            OSError: there is no capture, or it may not be opened.
        """
        maps = pin_dir / pins.CAPTURE / pins.MAPS
        with ExitStack() as resources:
            buffer = get_pinned(maps / "events")
            resources.callback(os.close, buffer)
            self._ring = RingBuffer(buffer)
            resources.callback(self._ring.close)
            self._watched = Map.open(maps / "watched", writable=True)
            resources.callback(self._watched.close)
            # A daemon that was killed may have left it so.
            self.watch(False)
            self._resources = resources.pop_all()

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to read."""
        return self._ring.fileno()

    def watch(self, wanted: bool) -> None:
        """Have the programs tell, or no more.

        Raises:
            KernelError: the kernel does not let it.
        """
        self._watched.update(_KEY, int(wanted).to_bytes(4, sys.byteorder))

    def read(self) -> Iterator[Event]:
        """What was told since the last time, in its order; there may be more.

        Raises:
            KernelError: the buffer cannot be read.
        """
        for sample in self._ring.read():
            if len(sample) == 8:
                yield int.from_bytes(sample, sys.byteorder)
            elif connection := records.connection(sample):
                yield connection

    def close(self) -> None:
        """Nobody watches any more."""
        self.watch(False)
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
