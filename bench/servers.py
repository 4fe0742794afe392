"""The ways to serve one service object over gRPC, each against an empty call.

All are up together and are called in turns, so that whatever else the host does
touches them alike. The empty call is carried by the same server object.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import psutil
import uvloop
from google.protobuf.empty_pb2 import Empty

from bench.callers import EMPTY_METHOD, KEYS_PER_BATCH, Caller, callers, stretch
from bench.child import Child, answer
from bench.crowd import Crowd
from bench.daemon import Daemon
from bench.effort import Effort
from bench.table import Row, Section, Target, Unit, Verdict
from peercred.v1 import peer_credentials_pb2 as pb
from peercredd.events import Events
from peercredd.server import MAX_OPEN_STREAMS, OPTIONS, Gate, Places, handlers
from peercredd.service import PeerCredentialsService
from peercredd.store import Store
from peercredd.watching import Hub

DAEMON = "asyncio, the daemon's"
KINDS = (DAEMON, "uvloop", "threads")
THREADS = 8
CALLERS = 4
SOCKETS = 1_000

RATE = Target(0.85, at_least=True)
LATENCY = Target(1.2)
KEYS_PER_CPU_SECOND = Target(50_000, at_least=True)


class _Server(NamedTuple):
    process: psutil.Process
    callers: list[Caller]


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        gathered = stack.enter_context(Crowd(daemon.cgroup))
        gathered.grow(SOCKETS)
        servers = {}
        for kind in KINDS:
            address = f"unix:{folder}/{kind.split(',')[0]}"
            server = stack.enter_context(Child("bench.servers", kind, daemon.pin_dir, address))
            server.hear()
            started = stack.enter_context(callers(CALLERS, address, gathered.questions))
            servers[kind] = _Server(psutil.Process(server.pid), started)
        return [_against_empty(effort, servers), _many_keys(effort, servers)]


def _against_empty(effort: Effort, servers: dict[str, _Server]) -> Section:
    rates: dict[str, list[tuple[float, float]]] = defaultdict(list)
    latencies: dict[str, list[tuple[float, float]]] = defaultdict(list)
    seconds = effort.call_seconds
    for _ in range(effort.call_rounds):
        for kind, server in servers.items():
            empty, lookup = (stretch(server.callers, c, seconds) for c in ("empty", "lookup"))
            rates[kind].append((empty.calls_per_second, lookup.calls_per_second))
            empty, lookup = (stretch(server.callers[:1], c, seconds) for c in ("empty", "lookup"))
            latencies[kind].append((empty.median_seconds, lookup.median_seconds))
    rows = [
        row
        for kind in servers
        for row in (
            _compared(f"{kind}: rate, {CALLERS} callers", rates[kind], Unit.PER_SECOND, RATE, kind),
            _compared(f"{kind}: median, one caller", latencies[kind], Unit.SECONDS, LATENCY, kind),
        )
    ]
    return Section("An empty gRPC call against Lookup, by server", ("empty", "Lookup"), tuple(rows))


def _compared(
    name: str, pairs: Sequence[tuple[float, float]], unit: Unit, target: Target, kind: str
) -> Row:
    ratio = statistics.median(lookup / empty for empty, lookup in pairs)
    medians = tuple(statistics.median(column) for column in zip(*pairs, strict=True))
    return Row(name, medians, unit, Verdict(ratio, target=target if kind == DAEMON else None))


def _many_keys(effort: Effort, servers: dict[str, _Server]) -> Section:
    work = {kind: {"batch": _Work(), "stream": _Work()} for kind in servers}
    for _ in range(effort.call_rounds):
        for kind, server in servers.items():
            for call, done in work[kind].items():
                done.add(server, call, effort.call_seconds)
    rows = []
    for kind in servers:
        batch, stream = work[kind]["batch"], work[kind]["stream"]
        per_cpu_second = KEYS_PER_BATCH * batch.calls / batch.cpu_seconds
        values = (
            *(KEYS_PER_BATCH * statistics.median(batch.rates), per_cpu_second),
            *(statistics.median(stream.rates), stream.calls / stream.cpu_seconds),
        )
        target = KEYS_PER_CPU_SECOND if kind == DAEMON else None
        verdict = Verdict(per_cpu_second, Unit.PER_SECOND, target)
        rows.append(Row(kind, values, Unit.PER_SECOND, verdict))
    columns = ("BatchLookup", "per CPU second", "LookupStream", "per CPU second")
    return Section(f"Keys answered, {CALLERS} callers, by server", columns, tuple(rows))


class _Work:
    """What a server did in several stretches: /proc counts its CPU time in 10 ms."""

    def __init__(self) -> None:
        self.calls = 0
        self.cpu_seconds = 0.0
        self.rates: list[float] = []

    def add(self, server: _Server, call: str, seconds: float) -> None:
        before = server.process.cpu_times()
        seen = stretch(server.callers, call, seconds)
        after = server.process.cpu_times()
        self.calls += seen.calls
        self.cpu_seconds += after.user + after.system - before.user - before.system
        self.rates.append(seen.calls_per_second)


def _be_server(kind: str, pin_dir: Path, address: str) -> None:
    with closing(Store(pin_dir)) as store, Events(pin_dir) as events:
        service = PeerCredentialsService(store)
        if kind == "threads":
            _serve_with_threads(service, address)
        else:
            run = uvloop.run if kind == "uvloop" else asyncio.run
            run(_serve_in_loop(store, Hub(store, events), service, address))


async def _serve_in_loop(
    store: Store, hub: Hub, service: PeerCredentialsService, address: str
) -> None:
    async def empty(data: bytes, _: Any) -> bytes:
        return _empty(data)

    server = grpc.aio.server(
        handlers=[
            *handlers(
                store,
                hub,
                Gate(
                    lambda _context, _lists: service,
                    Places(MAX_OPEN_STREAMS),
                    counts_early=False,
                ),
            ),
            _empty_handler(empty),
        ],
        options=OPTIONS,
    )
    server.add_insecure_port(address)
    await server.start()
    await asyncio.to_thread(_until_told)
    await server.stop(None)


def _serve_with_threads(service: PeerCredentialsService, address: str) -> None:
    def lookup(data: bytes, _: Any) -> bytes:
        return service.lookup(pb.LookupRequest.FromString(data)).SerializeToString()

    def batch(data: bytes, _: Any) -> bytes:
        pages = service.batch_lookup(pb.BatchLookupRequest.FromString(data))
        return b"".join(page.SerializeToString() for page in pages)

    def stream(messages: Iterator[bytes], _: Any) -> Iterator[bytes]:
        for data in messages:
            request = pb.LookupStreamRequest.FromString(data)
            yield service.lookup_stream(request).SerializeToString()

    api = grpc.method_handlers_generic_handler(
        pb.DESCRIPTOR.services_by_name["PeerCredentials"].full_name,
        {
            "Lookup": grpc.unary_unary_rpc_method_handler(lookup),
            "BatchLookup": grpc.unary_unary_rpc_method_handler(batch),
            "LookupStream": grpc.stream_stream_rpc_method_handler(stream),
        },
    )
    empty = _empty_handler(lambda data, _: _empty(data))
    server = grpc.server(ThreadPoolExecutor(THREADS), handlers=[api, empty], options=OPTIONS)
    server.add_insecure_port(address)
    server.start()
    _until_told()
    server.stop(None)


def _empty(data: bytes) -> bytes:
    Empty.FromString(data)
    return Empty().SerializeToString()


def _empty_handler(handle: Callable[[bytes, Any], Any]) -> grpc.GenericRpcHandler:
    _, service, method = EMPTY_METHOD.split("/")
    return grpc.method_handlers_generic_handler(
        service, {method: grpc.unary_unary_rpc_method_handler(handle)}
    )


def _until_told() -> None:
    answer("serving")
    sys.stdin.read()


if __name__ == "__main__":
    _be_server(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
