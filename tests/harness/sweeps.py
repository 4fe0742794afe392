"""Sweeps of a daemon's tables for as long as a test needs them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

from harness.daemon import Daemon, open_map
from peercredd.sweeper import Tables, sweep

AGE_NS = 1_000_000_000
BETWEEN_SECONDS = 0.2


@contextmanager
def sweeping(daemon: Daemon) -> Iterator[None]:
    """Sweep what is a second old, again and again; what a sweep raises is raised at the end.

    The daemon's own sweeps are processes: those of a second's interval are all that an
    emulated machine does.
    """
    ended = threading.Event()
    with ExitStack() as opened:
        tables = Tables(
            *(
                opened.enter_context(closing(open_map(daemon, name, writable=True)))
                for name in Tables._fields
            )
        )

        def go_on_sweeping() -> None:
            while not ended.wait(BETWEEN_SECONDS):
                sweep(tables, AGE_NS, AGE_NS)

        # What a sweep imports takes a slow machine longer than any sweep.
        sweep(tables, AGE_NS, AGE_NS)
        sweeps = opened.enter_context(ThreadPoolExecutor(max_workers=1)).submit(go_on_sweeping)
        try:
            yield
        finally:
            ended.set()
            sweeps.result()
