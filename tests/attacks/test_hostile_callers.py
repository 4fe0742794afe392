"""Callers that want the daemon for themselves, or its memory.

They may open the unix socket, so they are of the service's group. Whatever they do, the daemon
answers the others, and takes no more memory than its limits allow.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import psutil
import pytest

from harness import raw_http2, steps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.patience import patient
from harness.raw_http2 import CONTINUATION, DATA, HEADERS, PING, RST_STREAM, SETTINGS, frame
from harness.routes import V4
from harness.users import ALICE, SERVICE
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1.peer_credentials_pb2_grpc import PeerCredentialsStub
from peercredd import server

pytestmark = pytest.mark.kernel

OPTIONS = dict(server.OPTIONS)
LARGEST_MESSAGE = int(OPTIONS["grpc.max_receive_message_length"])
STREAMS = int(OPTIONS["grpc.max_concurrent_streams"])
WINDOW = 65_535
"""What HTTP/2 lets a peer send, on a connection, before it was read (RFC 9113, 6.9.2)."""
KEPT = 16 << 20
"""What may stay when the callers are gone: code that was run, and objects of Python's."""
SLACK = 32 << 20
"""What the first calls of a kind load, and the allocator keeps."""
RECORDS = 2000
CALL_SECONDS = patient(30)
CLOSE_SECONDS = patient(30)


class Target:
    """A daemon with many records, and one socket among them to ask about."""

    def __init__(self, daemon: Daemon, server_pid: int, cookie: int) -> None:
        self.daemon = daemon
        self._cookie = cookie
        self._process = psutil.Process(server_pid)

    def memory(self) -> int:
        """Bytes that its server has in memory."""
        return int(self._process.memory_info().rss)

    def descriptors(self) -> int:
        """How many its server has open."""
        return int(self._process.num_fds())

    def answers(self) -> bool:
        """Whether a caller who comes now is answered, and right."""
        with channel(self.daemon) as other:
            request = pb.LookupRequest(key=pb.ConnectionKey(socket_cookie=self._cookie))
            found = PeerCredentialsStub(other).Lookup(request, timeout=CALL_SECONDS)
            return found.peer.uid == ALICE

    def wait_until_given_back(self, memory: int) -> None:
        """Wait until it has no more in memory than that."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self.memory() > memory:
            assert time.monotonic() < deadline, f"{self.memory() >> 20} MiB, not {memory >> 20}"
            os.sched_yield()

    def wait_until_closed(self, descriptors: int) -> None:
        """Wait until it has no more open than that."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self.descriptors() > descriptors:
            assert time.monotonic() < deadline, f"{self.descriptors()} are open, not {descriptors}"
            os.sched_yield()


@contextmanager
def channel(daemon: Daemon) -> Iterator[grpc.Channel]:
    """A connection of its own: channels to one address share one unless told otherwise."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(daemon.address, options=options) as made:
        yield made


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with (
        Cgroup() as cgroup,
        Daemon(cgroup, "cgroup") as daemon,
        Origin(cgroup) as origin,
        daemon.client() as client,
        ExitStack() as actors,
    ):
        service, alice = origin.actor(), origin.actor()
        actors.callback(service.close)
        actors.callback(alice.close)
        service(steps.become, SERVICE)
        alice(steps.become, ALICE)
        fds = service(steps.bind, V4)
        service(steps.listen, fds, 2 * RECORDS)
        alice(steps.connect_many, service(steps.addresses, fds, V4).tcp, RECORDS, "silent")
        cookie = next(iter(client.connections())).server_socket_cookie
        yield Target(daemon, client.status().server_pid, cookie)


@pytest.fixture
def bounded(target: Target) -> Iterator[Callable[..., None]]:
    """Check that so many connections and calls have cost no more than the limits allow."""
    before = target.memory()

    def check(connections: int, calls: int, held: int = WINDOW) -> None:
        calls = min(calls, server.MAX_CONCURRENT_CALLS)
        allowed = SLACK + calls * LARGEST_MESSAGE + connections * held
        grown = target.memory() - before
        assert grown <= allowed, f"{grown >> 20} MiB more, of {allowed >> 20} MiB"

    yield check
    assert target.answers()
    target.wait_until_given_back(before + KEPT)


@pytest.mark.parametrize(
    "greeting", [b"", raw_http2.GREETING, b"GET / HTTP/1.1\r\n"], ids=["silent", "http2", "http1"]
)
def test_a_thousand_idle_connections_keep_nobody_out(
    target: Target, bounded: Callable[..., None], greeting: bytes
) -> None:
    before = target.descriptors()
    with ExitStack() as flood:
        for _ in range(1000):
            with suppress(ConnectionError):
                flood.enter_context(raw_http2.dial(target.daemon.socket, greeting))
        assert target.answers()
        bounded(1000, 0)
    target.wait_until_closed(before)


def test_two_thousand_lists_that_are_not_read_keep_nobody_out(
    target: Target, bounded: Callable[..., None]
) -> None:
    with ExitStack() as flood:
        begun = []
        for _ in range(2000 // 100):
            stub = PeerCredentialsStub(flood.enter_context(channel(target.daemon)))
            begun += [stub.ListConnections(pb.ListConnectionsRequest()) for _ in range(100)]
        # Refused, or answered as far as somebody reads.
        for call in begun:
            with suppress(grpc.RpcError):
                next(call)
        assert target.answers()
        bounded(2000 // 100, len(begun))
        # Nobody who asks once is kept from it by those who keep asking.
        assert all(target.answers() for _ in range(20))


def test_two_thousand_streams_that_stay_open_keep_nobody_out(
    target: Target, bounded: Callable[..., None]
) -> None:
    with ExitStack() as flood:
        socks = [
            flood.enter_context(raw_http2.dial(target.daemon.socket))
            for _ in range(2048 // STREAMS)
        ]
        for sock in socks:
            for number in range(STREAMS):
                sock.sendall(raw_http2.call(1 + 2 * number, "LookupStream"))
        # Half of a message each, which is never finished.
        half = frame(DATA, 0, 1, b"\0" + (LARGEST_MESSAGE - 1).to_bytes(4, "big") + bytes(8000))
        for sock in socks:
            sock.sendall(half)
        # More than it takes have come at once: until they are refused, others may be too.
        surplus = 2048 - server.MAX_OPEN_STREAMS
        raw_http2.wait_until_ended(socks, surplus, CALL_SECONDS)
        assert all(target.answers() for _ in range(20))
        bounded(len(socks), 2048)


def test_five_thousand_cancelled_streams_leave_nothing(
    target: Target, bounded: Callable[..., None]
) -> None:
    before = target.descriptors()
    with channel(target.daemon) as flood:
        stub = PeerCredentialsStub(flood)
        for number in range(5000):
            call = stub.ListConnections(pb.ListConnectionsRequest())
            if number % 2:
                with suppress(grpc.RpcError):
                    next(call)
            call.cancel()
        assert target.answers()
        bounded(1, STREAMS)
    target.wait_until_closed(before)


def test_streams_opened_and_reset_at_once_leave_nothing(
    target: Target, bounded: Callable[..., None]
) -> None:
    """The rapid reset of CVE-2023-44487."""
    before = target.descriptors()
    for _ in range(10):
        with raw_http2.dial(target.daemon.socket) as sock, suppress(ConnectionError):
            for number in range(2000):
                stream = 1 + 2 * number
                reset = frame(RST_STREAM, 0, stream, (8).to_bytes(4, "big"))
                sock.sendall(raw_http2.call(stream, "ListConnections") + reset)
                drain(sock)
        assert target.answers()
    bounded(10, STREAMS)
    target.wait_until_closed(before)


def test_half_closed_connections_keep_nobody_out_and_go_with_their_callers(
    target: Target, bounded: Callable[..., None]
) -> None:
    before = target.descriptors()
    with ExitStack() as flood:
        for number in range(500):
            sock = flood.enter_context(raw_http2.dial(target.daemon.socket))
            sock.sendall(raw_http2.call(1, "Lookup") if number % 2 else b"")
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR if number % 3 else socket.SHUT_RD)
        assert target.answers()
        bounded(500, 500)
    target.wait_until_closed(before)


RANDOM = random.Random(0).randbytes(1 << 16)
GARBAGE = {
    "random frames": b"".join(
        frame(RANDOM[i], RANDOM[i + 1], i % 7, RANDOM[i : i + 100]) for i in range(0, 8000, 4)
    ),
    "a frame too long": frame(DATA, 0, 1, bytes(1 << 20)),
    "pings": frame(PING, 0, 0, bytes(8)) * 5000,
    "settings": frame(SETTINGS, 0, 0, b"\0\4\0\0\xff\xff") * 5000,
    "headers without end": frame(HEADERS, 0, 1, raw_http2.field("a", "b" * 100))
    + frame(CONTINUATION, 0, 1, raw_http2.field("a", "b" * 100) * 100) * 200,
    "headers too long": frame(HEADERS, 4, 1, raw_http2.field("a", "b" * 100) * 150),
    "a message of 4 GiB": raw_http2.call(1, "Lookup")
    + frame(DATA, 0, 1, b"\0\xff\xff\xff\xff" + bytes(16_000)),
    "a message that is compressed, it says": raw_http2.call(1, "Lookup")
    + frame(DATA, 1, 1, b"\1\0\0\0\4" + bytes(4)),
    "a path of garbage": raw_http2.call(1, "\x00\xff\n"),
    "data of no stream": frame(DATA, 0, 99, bytes(100)) * 1000,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_in_the_place_of_frames_harms_nobody(
    target: Target, bounded: Callable[..., None], name: str
) -> None:
    before = target.descriptors()
    logged = target.daemon.log()
    with ExitStack() as flood:
        for _ in range(20):
            sock = flood.enter_context(raw_http2.dial(target.daemon.socket))
            sock.setblocking(False)
            left = memoryview(GARBAGE[name])
            # The daemon need not read it all.
            with suppress(OSError):
                while left:
                    left = left[sock.send(left) :]
                    drain(sock)
        assert target.answers()
        # gRPC keeps headers as long as they do not end: docs/threat-model.md.
        bounded(20, 20, len(GARBAGE[name]) if name == "headers without end" else WINDOW)
    target.wait_until_closed(before)
    for line in target.daemon.log().removeprefix(logged).splitlines():
        assert json.loads(line)["level"] != "error"


def test_a_caller_that_is_killed_in_the_middle_of_each_kind_of_call_leaves_nothing(
    target: Target, tmp_path: Path
) -> None:
    before = target.descriptors()
    for method in ("Lookup", "BatchLookup", "LookupStream", "ListConnections", "GetStatus"):
        for _ in range(50):
            with raw_http2.dial(target.daemon.socket) as sock:
                sock.sendall(raw_http2.call(1, method) + frame(DATA, 0, 1, b"\0\0\0\1\0"))
    target.wait_until_closed(before)
    assert target.answers()


def drain(sock: socket.socket) -> None:
    """Read what has come, so that nothing waits for it."""
    while select.select([sock], [], [], 0)[0] and sock.recv(65_536):
        pass
