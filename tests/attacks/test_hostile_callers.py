"""Callers that want the daemon for themselves, or its memory.

Over the unix socket they are of the service's group; on loopback TCP they are anybody. Whatever
they do, the daemon answers the others, and takes no more memory than its limits allow.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import psutil
import pytest

from harness import caller, hostile, raw_http2, steps
from harness.actors import Actor, Origin
from harness.cgroup import Cgroup
from harness.channel import Descriptor
from harness.daemon import Daemon
from harness.netns import NetworkNamespace
from harness.patience import patient
from harness.raw_http2 import Address
from harness.routes import V4
from harness.users import ALICE, BOB, CAROL
from peercred.v1 import peer_credentials_pb2 as pb
from peercredd import callers, server, watching
from peercredd.connections import MOST_UNHEARD

pytestmark = pytest.mark.kernel

P = ParamSpec("P")
R = TypeVar("R")

PROJECT = Path(__file__).parents[2]
PORT = 338
ADDRESS = "127.0.0.1", PORT
TCP = f"ipv4:127.0.0.1:{PORT}"
API = "/peercred.v1.PeerCredentials"
LARGEST_MESSAGE = int(dict(server.OPTIONS)["grpc.max_receive_message_length"])
WINDOW = 65_535
"""What HTTP/2 lets a peer send, on a connection, before it was read (RFC 9113, 6.9.2)."""
KEPT = 16 << 20
"""What may stay when the callers are gone: code that was run, and objects of Python's."""
SLACK = 32 << 20
"""What the first calls of a kind load, and the allocator keeps."""
RECORDS = 2000
UNREAD = ("ListConnections", "WatchConnections")
FLOODS = 2000
"""Calls, more than there may be on either transport."""
CALL_SECONDS = patient(30)
FLOOD_SECONDS = patient(120)
CLOSE_SECONDS = patient(30)


class Place:
    """A network namespace with a daemon that has many records, and those who call it."""

    def __init__(self, undo: ExitStack) -> None:
        self._undo = undo
        cgroup = undo.enter_context(Cgroup())
        namespace = undo.enter_context(NetworkNamespace())
        self.daemon = undo.enter_context(
            Daemon(cgroup, "cgroup", tcp_port=PORT, namespace=namespace)
        )
        self._ready = undo.enter_context(closing(undo.enter_context(Origin(cgroup)).actor()))
        self._ready(steps.enter_network_namespace, Descriptor(namespace.fd))
        self._ready(caller.prepare, [str(PROJECT), str(PROJECT / "clients"), *sys.path])
        alice = self.actor(ALICE)
        # What the attackers may list, and what the others ask about.
        alice(steps.connect_many, self._listen(CAROL), RECORDS, "silent")
        alice(steps.connect_many, self._listen(BOB), 1, "silent")
        with self.daemon.client() as client:
            (self.cookie,) = (
                each.server_socket_cookie
                for each in client.connections()
                if each.listener and each.listener.uid == BOB
            )
            self.server = psutil.Process(client.status().server_pid)

    def _listen(self, uid: int) -> object:
        listener = self.actor(uid)
        fds = listener(steps.bind, V4)
        listener(steps.listen, fds, 2 * RECORDS)
        return listener(steps.addresses, fds, V4).tcp

    def actor(self, uid: int) -> Actor:
        actor = self.fork(self._ready)
        if uid:
            actor(steps.become, uid)
        return actor

    def fork(self, actor: Actor) -> Actor:
        return self._undo.enter_context(closing(actor.fork()))

    def refused(self, reason: str) -> int:
        with self.daemon.client() as client:
            return next(each.count for each in client.status().refusals if each.reason == reason)


class Transport(NamedTuple):
    """How callers reach the daemon, and what it takes there."""

    address: Address
    target: str
    """The same, as gRPC has it."""
    streams_per_connection: int
    calls: int
    """Under way, at most, of one user."""
    streams: int
    """Of these."""
    unread: dict[str, int]
    """Of these, by method."""


class Target:
    """The daemon on one transport: who attacks it there, and another who asks."""

    def __init__(self, place: Place, transport: Transport, attacker: Actor, other: Actor) -> None:
        self.daemon = place.daemon
        self.transport = transport
        self.attacker = attacker
        self._other = other
        self._cookie = place.cookie
        self._server = place.server

    def memory(self) -> int:
        """Bytes that the server has in memory."""
        return int(self._server.memory_info().rss)

    def descriptors(self) -> int:
        """How many the server has open."""
        return int(self._server.num_fds())

    def answers(self) -> bool:
        """Whether a caller who comes now is answered, and right."""
        request = pb.LookupRequest(key=pb.ConnectionKey(socket_cookie=self._cookie))
        call = self._other.start(
            caller.call,
            self.transport.target,
            f"{API}/Lookup",
            request.SerializeToString(),
            seconds=CALL_SECONDS,
            anew=True,
        )
        reply = call.result(2 * CALL_SECONDS)
        assert reply.code == "OK", reply
        return pb.LookupResponse.FromString(reply.messages[0]).peer.uid == ALICE

    def flooded(self, flood: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """Have the attacker do it, and wait until all of it has been sent."""
        return self.attacker.start(flood, *arguments, **named).result(FLOOD_SECONDS)

    def begins_soon(self, method: str) -> None:
        """Wait until the attacker, too, gets a first answer of such a call."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while not self.attacker(
            hostile.ask_and_read_nothing, self.transport.target, method, 1, 1
        ).get("OK"):
            assert time.monotonic() < deadline

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


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with ExitStack() as undo:
        yield Place(undo)


@pytest.fixture(scope="module", params=["unix", "tcp"])
def target(place: Place, request: pytest.FixtureRequest) -> Target:
    if request.param == "unix":
        transport = Transport(
            place.daemon.socket,
            place.daemon.address,
            int(dict(server.OPTIONS)["grpc.max_concurrent_streams"]),
            calls=server.MAX_CONCURRENT_CALLS,
            streams=server.MAX_OPEN_STREAMS,
            unread={
                "ListConnections": server.MAX_OPEN_STREAMS,
                "WatchConnections": watching.MAX_WATCHERS,
            },
        )
        return Target(place, transport, place.actor(0), place.actor(0))
    transport = Transport(
        ADDRESS,
        TCP,
        int(dict(server.TCP_OPTIONS)["grpc.max_concurrent_streams"]),
        calls=callers.MAX_CALLS_PER_USER + server.MAX_CALLS_UNSEEN,
        streams=callers.MAX_CALLS_PER_USER,
        unread=dict.fromkeys(UNREAD, callers.MAX_LISTS_PER_USER),
    )
    return Target(place, transport, place.actor(CAROL), place.actor(BOB))


@pytest.fixture
def attacker(target: Target) -> Iterator[Actor]:
    """Who attacks; what that leaves open is closed at the end, and the memory given back."""
    before = target.memory()
    yield target.attacker
    target.attacker(hostile.let_go)
    assert target.answers()
    target.wait_until_given_back(before + KEPT)


@pytest.fixture
def bounded(target: Target) -> Callable[..., None]:
    """Check that so many connections and calls have cost no more than the limits allow."""
    before = target.memory()

    def check(connections: int, calls: int, held: int = WINDOW) -> None:
        allowed = SLACK + calls * LARGEST_MESSAGE + connections * held
        grown = target.memory() - before
        assert grown <= allowed, f"{grown >> 20} MiB more, of {allowed >> 20} MiB"

    return check


@pytest.mark.parametrize(
    "greeting", [b"", raw_http2.GREETING, b"GET / HTTP/1.1\r\n"], ids=["silent", "http2", "http1"]
)
def test_a_thousand_idle_connections_keep_nobody_out(
    target: Target, attacker: Actor, bounded: Callable[..., None], greeting: bytes
) -> None:
    before = target.descriptors()
    target.flooded(hostile.be_idle, target.transport.address, 1000, greeting)

    assert target.answers()
    bounded(1000, 0)
    attacker(hostile.let_go)
    target.wait_until_closed(before)


@pytest.mark.parametrize("method", UNREAD)
def test_two_thousand_lists_or_watches_that_are_not_read_keep_nobody_out(
    target: Target, attacker: Actor, bounded: Callable[..., None], method: str
) -> None:
    connections, limit = FLOODS // 100, target.transport.unread[method]
    codes = target.flooded(
        hostile.ask_and_read_nothing, target.transport.target, method, connections, 100
    )

    # A client reads ahead, some lists to their end. Who asks too much HTTP/2 refuses, too.
    assert limit <= codes.pop("OK") < FLOODS // 2
    assert codes.keys() <= {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED"}
    assert target.answers()
    bounded(connections, limit)
    # Nobody who asks once is kept from it by those who keep asking.
    assert all(target.answers() for _ in range(20))


def test_two_thousand_streams_that_stay_open_keep_nobody_out(
    target: Target, attacker: Actor, bounded: Callable[..., None]
) -> None:
    transport = target.transport
    connections = FLOODS // transport.streams_per_connection
    # More than it takes have come at once: until they are refused, others may be too.
    target.flooded(
        hostile.open_streams,
        transport.address,
        connections,
        transport.streams_per_connection,
        LARGEST_MESSAGE - 1,
        connections * transport.streams_per_connection - transport.streams,
        CALL_SECONDS,
    )

    assert all(target.answers() for _ in range(20))
    bounded(connections, transport.streams)


@pytest.mark.parametrize("method", UNREAD)
def test_five_thousand_cancelled_streams_leave_nothing(
    target: Target, attacker: Actor, bounded: Callable[..., None], method: str
) -> None:
    before = target.descriptors()
    target.flooded(hostile.cancel_streams, target.transport.target, method, 5000)

    assert target.answers()
    # No place of theirs is taken for longer than they last.
    target.begins_soon(method)
    attacker(hostile.let_go)
    bounded(1, target.transport.streams_per_connection)
    target.wait_until_closed(before)


def test_streams_opened_and_reset_at_once_leave_nothing(
    target: Target, attacker: Actor, bounded: Callable[..., None]
) -> None:
    """The rapid reset of CVE-2023-44487."""
    before = target.descriptors()
    for _ in range(10):
        target.flooded(hostile.reset_streams, target.transport.address, 2000)
        assert target.answers()
    bounded(10, target.transport.streams_per_connection)
    target.wait_until_closed(before)


def test_half_closed_connections_keep_nobody_out_and_go_with_their_callers(
    target: Target, attacker: Actor, bounded: Callable[..., None]
) -> None:
    before = target.descriptors()
    target.flooded(hostile.half_close, target.transport.address, 500)

    assert target.answers()
    bounded(500, target.transport.calls)
    attacker(hostile.let_go)
    target.wait_until_closed(before)


@pytest.mark.parametrize("name", hostile.GARBAGE)
def test_garbage_in_the_place_of_frames_harms_nobody(
    target: Target, attacker: Actor, bounded: Callable[..., None], name: str
) -> None:
    before = target.descriptors()
    logged = target.daemon.log()
    sent = target.flooded(hostile.send_garbage, target.transport.address, name, 20)

    assert target.answers()
    # gRPC keeps headers as long as they do not end: docs/threat-model.md.
    bounded(20, 20, 2 * sent // 20 if name == "headers without end" else WINDOW)
    attacker(hostile.let_go)
    target.wait_until_closed(before)
    for line in target.daemon.log().removeprefix(logged).splitlines():
        assert json.loads(line)["level"] != "error", line


def test_headers_that_do_not_end_cost_who_sends_them_the_connections_and_nobody_else(
    place: Place,
) -> None:
    attacker, other = place.actor(CAROL), place.actor(ALICE)
    # Much has been heard over this connection: that is not what it is about.
    keys = [pb.ConnectionKey(socket_cookie=2**63 + number) for number in range(200)]
    batch = pb.BatchLookupRequest(keys=keys).SerializeToString()
    for _ in range(20 * MOST_UNHEARD // len(batch)):
        assert other(caller.call, TCP, f"{API}/BatchLookup", batch).code == "OK"
    port = other(caller.port_of_connection, PORT)
    refused = place.refused("TOO_MUCH_SENT")
    # Of so many fields gRPC makes 24 MB; of twice as many it keeps none.
    flood = attacker.start(hostile.send_headers_until_closed, ADDRESS, 16, 400_000)
    give_up = time.monotonic() + FLOOD_SECONDS
    while place.refused("TOO_MUCH_SENT") == refused:
        assert other(caller.call, TCP, f"{API}/WhoAmI", b"").code == "OK"
        assert time.monotonic() < give_up

    flood.result(FLOOD_SECONDS)
    assert other(caller.port_of_connection, PORT) == port


def test_a_caller_that_is_killed_in_the_middle_of_each_kind_of_call_leaves_nothing(
    place: Place, target: Target
) -> None:
    before = target.descriptors()
    killed = place.fork(target.attacker)
    methods = ["Lookup", "BatchLookup", "LookupStream", *UNREAD, "GetStatus", "WhoAmI"]
    killed(hostile.begin, target.transport.address, methods, 50)
    killed.kill()
    target.wait_until_closed(before)
    assert target.answers()
