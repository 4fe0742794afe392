"""Figures for Prometheus, at an address of their own.

Imported only where that is asked for: its library brings 5 MB.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import peercredd
from peercredd.figures import BOUNDS_SECONDS, Figures
from peercredd.listen import ListenError
from peercredd.store import Attachment, StoreStatus, Totals

MAX_SCRAPES: Final = 8
"""At the same time; who comes beyond it is hung up on."""

SCRAPE_SECONDS: Final = 10
"""How long a request may take to come."""

REST: Final = 9
"""Between two measurements, as many times as long as the one before took."""


class Source(Protocol):
    """What is measured; the Store is one. Asked from several threads."""

    def status(self) -> StoreStatus:
        """Return what the capture says of itself."""

    def totals(self) -> Totals:
        """Return how many records there have been."""

    def attachments(self) -> dict[str, Attachment]:
        """Return for each program whether it is in its place now, and how often it ran."""


class Measured(Collector):
    """All figures, as they are when they are asked for.

    To count what the tables have takes long if that is much, and the server answers slower
    meanwhile. So all who ask at a time get the same figures, and most of the time is nobody's.
    """

    def __init__(self, source: Source, figures: Figures) -> None:
        self._source = source
        self._figures = figures
        self._measuring = threading.Lock()
        self._measured: list[Metric] = []
        self._begun = self._next = 0.0

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; those that the kernel does not give are left out."""
        asked = time.monotonic()
        with self._measuring:
            if self._begun < asked:
                time.sleep(max(0.0, self._next - time.monotonic()))
                begun = time.monotonic()
                self._measured = list(self._measure())
                self._begun, now = begun, time.monotonic()
                self._next = now + REST * (now - begun)
            measured = self._measured
        yield from measured

    def _measure(self) -> Iterator[Metric]:
        status = self._source.status()
        yield InfoMetricFamily(
            "peercredd_build",
            "What runs.",
            {
                "version": peercredd.__version__,
                "hook_set": status.hook_set,
                "kernel": os.uname().release,
            },
        )
        yield from self._capture()
        yield from _tables(status)
        yield from self._work()

    def _capture(self) -> Iterator[Metric]:
        programs = self._source.attachments()
        attached = GaugeMetricFamily(
            "peercredd_program_attached",
            "Whether a BPF program is in its place; without it connections are not recorded.",
            labels=["program"],
        )
        runs = CounterMetricFamily(
            "peercredd_program_runs",
            "Runs of a BPF program, while the sysctl kernel.bpf_stats_enabled is 1.",
            labels=["program"],
        )
        missed = CounterMetricFamily(
            "peercredd_program_missed",
            "Runs of a BPF program that the kernel left out; what happened then is not recorded.",
            labels=["program"],
        )
        for name, state in programs.items():
            attached.add_metric([name], state.attached)
            if state.run_count is not None:
                runs.add_metric([name], state.run_count)
            if state.missed_count is not None:
                missed.add_metric([name], state.missed_count)
        yield from (attached, runs, missed)
        totals = self._source.totals()
        yield CounterMetricFamily(
            "peercredd_connections_established",
            "Connections recorded since the capture began.",
            totals.established,
        )
        yield CounterMetricFamily(
            "peercredd_connections_retired",
            "Records that the programs retired since the capture began; the sweeper's are not "
            "among them.",
            totals.retired,
        )

    def _work(self) -> Iterator[Metric]:
        lookups = CounterMetricFamily(
            "peercredd_lookups", "Keys looked up, by outcome.", labels=["outcome"]
        )
        for outcome, count in sorted(self._figures.lookups.items()):
            lookups.add_metric([outcome], count)
        yield lookups
        calls = HistogramMetricFamily(
            "peercredd_call_duration_seconds",
            "From the arrival of a call's message to its answer.",
            labels=["method"],
        )
        bounds = (*map(str, BOUNDS_SECONDS), "+Inf")
        for method, durations in sorted(self._figures.calls.items()):
            sums = itertools.accumulate(durations.buckets)
            calls.add_metric([method], list(zip(bounds, sums, strict=True)), durations.sum_seconds)
        yield calls


def _tables(status: StoreStatus) -> Iterator[Metric]:
    entries = GaugeMetricFamily(
        "peercredd_table_entries", "Entries of a table now.", labels=["table"]
    )
    room = GaugeMetricFamily(
        "peercredd_table_max_entries", "Entries that a table has room for.", labels=["table"]
    )
    for table in status.tables:
        entries.add_metric([table.name], table.entries)
        room.add_metric([table.name], table.max_entries)
    drops = CounterMetricFamily(
        "peercredd_drops", "What was not recorded, by reason.", labels=["reason"]
    )
    for drop in status.drops:
        drops.add_metric([drop.reason], drop.occurrences)
    yield from (entries, room, drops)


@contextmanager
def serving(host: str, port: int, measured: Measured) -> Iterator[int]:
    """Serve ``http://HOST:PORT/metrics`` from a thread, and yield the port.

    Raises:
        ListenError: nobody can listen there.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(measured)
    kind = _Server6 if ":" in host else _Server
    try:
        server = kind((host, port), _Handler)
    except OSError as error:
        raise ListenError(
            f"metrics.address: cannot listen at {host} port {port}: {error.strerror}; mend that or "
            "choose another address"
        ) from error
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class _Handler(WSGIRequestHandler):
    timeout = SCRAPE_SECONDS

    def setup(self) -> None:
        """Give the whole request a time; `timeout` is for each part of it, however short."""
        super().setup()
        self._too_slow = threading.Timer(SCRAPE_SECONDS, _hang_up, (self.connection,))
        self._too_slow.daemon = True
        self._too_slow.start()

    def parse_request(self) -> bool:
        """Parse, when it has come."""
        try:
            return super().parse_request()
        finally:
            self._too_slow.cancel()

    def finish(self) -> None:
        """Be done with it, whatever has come."""
        self._too_slow.cancel()
        super().finish()

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - its base's name
        """Log nothing: strangers choose what is asked."""


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_SCRAPES

    def __init__(self, *arguments: Any) -> None:
        self._room = threading.BoundedSemaphore(MAX_SCRAPES)
        super().__init__(*arguments)

    def server_bind(self) -> None:
        """Bind, without asking for the address's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if there is one to be had."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of who hangs up."""


class _Server6(_Server):
    address_family = socket.AF_INET6
