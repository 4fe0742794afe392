"""Connections made and closed at a rate, beside what is measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.cycle import Cycle

BURST = 50
"""Connections that are made in one go."""


class Pace:
    """How many there were, and in which time."""

    def __init__(self) -> None:
        self.connections = 0
        self.seconds = 0.0


@contextmanager
def connecting(program: Path, cgroup: Path, per_second: float) -> Iterator[Pace]:
    """Have `program`, bench/cycle.c compiled, make so many; on leaving, the Pace is exact.

    In bursts, each of them caught up on if it came late.
    """
    pace, stop = Pace(), threading.Event()

    def connect() -> None:
        begin = time.monotonic()
        while not stop.wait(begin + pace.connections / per_second - time.monotonic()):
            pace.connections += cycle.cost(cgroup).connections
        pace.seconds = time.monotonic() - begin

    with Cycle(program, "4", "reset", BURST, 0) as cycle:
        thread = threading.Thread(target=connect)
        thread.start()
        try:
            yield pace
        finally:
            stop.set()
            thread.join()
