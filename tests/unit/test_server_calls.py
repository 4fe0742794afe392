from __future__ import annotations

import asyncio
import grp
import itertools
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status
from structlog.testing import capture_logs

from harness.memory_events import MemoryEvents
from harness.memory_view import MemoryView, connection
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as pb_grpc
from peercredd import health, server
from peercredd.listen import ListenError, UnixSocket
from peercredd.records import Connection
from peercredd.store import Answer, Attachment, Reason
from peercredd.watching import Hub

OWN_GROUP = grp.getgrgid(os.getegid()).gr_name
API = "/peercred.v1.PeerCredentials"
HEALTH = "/grpc.health.v1.Health"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection"
FOUND = pb.ConnectionKey(socket_cookie=10)
MISSING = pb.ConnectionKey(socket_cookie=11)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class EndlessView(MemoryView):
    """So many connections that no client takes them all; counts those that were read."""

    reads = 0

    def pages(self, size: int) -> Iterator[list[Connection]]:
        for _ in range(0, 200_000, size):
            self.reads += size
            yield [self.connections[10]] * size


class BrokenView(MemoryView):
    def find_by_socket(self, cookie: int) -> Answer | Reason:
        raise RuntimeError("a secret of the inside")

    def pages(self, size: int) -> Iterator[list[Connection]]:
        raise RuntimeError("a secret of the inside")

    def is_attached(self) -> bool:
        raise RuntimeError("a secret of the inside")

    def problems(self) -> list[str]:
        raise RuntimeError("a secret of the inside")

    def attachments(self) -> dict[str, Attachment]:
        raise RuntimeError("a secret of the inside")


class CountingView(MemoryView):
    """Counts the keys that were looked up."""

    finds = 0

    def find_by_socket(self, cookie: int) -> Answer | Reason:
        self.finds += 1
        return super().find_by_socket(cookie)


@contextmanager
def served(view: MemoryView, path: Path) -> Iterator[grpc.Channel]:
    """The real server in an event loop and a thread of its own, and a channel to it."""
    started: Future[Callable[[], object]] = Future()

    async def main() -> None:
        stop = asyncio.Event()
        with UnixSocket(path, OWN_GROUP) as unix_socket:
            async with server.serving(view, Hub(view, events), unix_socket.private_path):
                unix_socket.publish()
                loop = asyncio.get_running_loop()
                started.set_result(lambda: loop.call_soon_threadsafe(stop.set))
                await stop.wait()

    with closing(MemoryEvents()) as events, ThreadPoolExecutor(1) as thread:
        ended = thread.submit(asyncio.run, main())
        first: Future[Any] = next(as_completed((started, ended)))
        stop = first.result()
        try:
            with dialled(path) as channel:
                yield channel
        finally:
            stop()
            ended.result()


@contextmanager
def dialled(path: Path) -> Iterator[grpc.Channel]:
    # Channels to one address share a connection unless told otherwise.
    with grpc.insecure_channel(
        f"unix:{path}", options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        yield channel


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def view() -> MemoryView:
    return MemoryView(connection(10))


@pytest.fixture
def channel(view: MemoryView, path: Path) -> Iterator[grpc.Channel]:
    with served(view, path) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.PeerCredentialsStub:
    return pb_grpc.PeerCredentialsStub(channel)


def answers(channel: grpc.Channel) -> bool:
    found = pb_grpc.PeerCredentialsStub(channel).Lookup(
        pb.LookupRequest(key=FOUND), timeout=60, wait_for_ready=True
    )
    return found.peer.uid == 1000


def failure(call: Callable[[], object]) -> grpc.Call:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    assert isinstance(raised.value, grpc.Call)
    return raised.value


# Calls that take and give bytes as they are on the wire.
def raw_unary(channel: grpc.Channel, method: str) -> grpc.UnaryUnaryMultiCallable[bytes, bytes]:
    return channel.unary_unary(method)


def raw_stream(channel: grpc.Channel, method: str) -> grpc.StreamStreamMultiCallable[bytes, bytes]:
    return channel.stream_stream(method)


def test_every_method_answers(stub: pb_grpc.PeerCredentialsStub) -> None:
    found = stub.Lookup(pb.LookupRequest(key=FOUND))
    assert found.peer.uid == 1000
    (result,) = stub.BatchLookup(pb.BatchLookupRequest(keys=[FOUND])).results
    assert result.found == found
    (response,) = stub.LookupStream(iter([pb.LookupStreamRequest(key=FOUND)]))
    assert response.result.found == found
    (page,) = stub.ListConnections(pb.ListConnectionsRequest())
    assert [each.client.uid for each in page.connections] == [1000]
    assert stub.GetStatus(pb.GetStatusRequest()).daemon_pid == os.getpid()


def test_an_error_carries_code_reason_and_field(stub: pb_grpc.PeerCredentialsStub) -> None:
    error = failure(lambda: stub.Lookup(pb.LookupRequest(key=MISSING)))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "no connect() of that connection" in str(error.details())

    error = failure(lambda: stub.Lookup(pb.LookupRequest()))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(error)
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("peercred.v1", "INVALID_KEY")
    assert info.metadata["field"] == "key"


def test_a_batch_longer_than_a_page_comes_as_one_answer_in_order(
    stub: pb_grpc.PeerCredentialsStub,
) -> None:
    keys = [FOUND, MISSING] * 500

    results = stub.BatchLookup(pb.BatchLookupRequest(keys=keys)).results

    assert [result.WhichOneof("result") for result in results] == ["found", "error"] * 500


def test_a_thousand_keys_of_the_longest_form_are_not_too_big(
    stub: pb_grpc.PeerCredentialsStub,
) -> None:
    longest = pb.Endpoint(address="2001:0db8:1111:1111:1111:1111:111.111.111.111", port=65535)
    longest.address += "%" + "z" * 15
    key = pb.ConnectionKey(
        socket_cookie=2**64 - 1, netns_cookie=2**64 - 1, local=longest, remote=longest
    )

    assert len(stub.BatchLookup(pb.BatchLookupRequest(keys=[key] * 1000)).results) == 1000


def test_a_message_that_is_too_big_is_refused(stub: pb_grpc.PeerCredentialsStub) -> None:
    key = pb.ConnectionKey(local=pb.Endpoint(address="x" * 300_000))

    error = failure(lambda: stub.Lookup(pb.LookupRequest(key=key)))

    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_stream_is_answered_in_order_while_it_stays_open(
    stub: pb_grpc.PeerCredentialsStub,
) -> None:
    asked = threading.Semaphore(0)
    more = iter([FOUND, MISSING, pb.ConnectionKey()] * 100)

    def requests() -> Iterator[pb.LookupStreamRequest]:
        for key in more:
            yield pb.LookupStreamRequest(key=key)
            asked.acquire()

    codes = []
    for response in stub.LookupStream(requests()):
        codes.append(response.result.error.code)
        asked.release()
    assert codes == [0, grpc.StatusCode.NOT_FOUND.value[0], 3] * 100


def test_a_filter_that_nothing_passes_ends_the_list_without_a_message(
    stub: pb_grpc.PeerCredentialsStub,
) -> None:
    assert list(stub.ListConnections(pb.ListConnectionsRequest(client_uid=77))) == []


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    error = failure(lambda: raw_unary(channel, f"{API}/Guess")(b""))

    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "method",
    [
        f"{API}/Lookup",
        f"{API}/BatchLookup",
        f"{API}/ListConnections",
        f"{API}/GetStatus",
        f"{HEALTH}/Check",
        f"{HEALTH}/Watch",
    ],
)
def test_garbage_is_an_invalid_argument_and_not_worth_a_line_of_log(
    channel: grpc.Channel, method: str
) -> None:
    with capture_logs() as logs:
        error = failure(lambda: list(raw_stream(channel, method)(iter([b"\xff\xff\xff"]))))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert logs == []


@pytest.mark.parametrize("method", [f"{API}/LookupStream", f"{REFLECTION}/ServerReflectionInfo"])
def test_garbage_ends_a_stream(channel: grpc.Channel, method: str) -> None:
    error = failure(lambda: list(raw_stream(channel, method)(iter([b"\xff\xff\xff"]))))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_after_ten_thousand_garbage_messages_it_answers_the_others(
    channel: grpc.Channel, path: Path
) -> None:
    chance = random.Random(0)
    methods = [
        raw_unary(channel, f"{API}/{name}") for name in ("Lookup", "BatchLookup", "GetStatus")
    ]
    with dialled(path) as other:
        for _ in range(100):
            calls = [
                chance.choice(methods).future(chance.randbytes(chance.randrange(1, 200)))
                for _ in range(100)
            ]
            assert answers(other)
            codes = {call.code() for call in calls}
            assert codes <= {
                grpc.StatusCode.OK,  # unknown fields are no garbage to protobuf
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.NOT_FOUND,
            }


def test_bytes_that_are_no_http2_harm_nobody(channel: grpc.Channel, path: Path) -> None:
    chance = random.Random(0)
    for size in (0, 1, 24, 4096) * 25:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(chance.randbytes(size))
    assert answers(channel)


def test_connections_beyond_the_limit_are_closed_and_the_others_served(
    view: MemoryView, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 10)
    with served(view, path) as channel, ExitStack() as flood:
        assert answers(channel)  # by the first of the ten
        greeted = 0
        for _ in range(30):
            raw = flood.enter_context(socket.socket(socket.AF_UNIX))
            raw.connect(str(path))
            with suppress(ConnectionResetError):
                greeted += bool(raw.recv(1))  # the SETTINGS that HTTP/2 begins with
        assert greeted == 9
        assert answers(channel)
        flood.close()
        with dialled(path) as later:
            assert answers(later)


@pytest.mark.parametrize(
    ("method", "request_message"),
    [
        (f"{API}/Lookup", pb.LookupRequest(key=FOUND)),
        (f"{API}/BatchLookup", pb.BatchLookupRequest(keys=[FOUND])),
        (f"{API}/LookupStream", pb.LookupStreamRequest(key=FOUND)),
        (f"{API}/ListConnections", pb.ListConnectionsRequest()),
        (f"{API}/GetStatus", pb.GetStatusRequest()),
        (f"{HEALTH}/Check", health_pb2.HealthCheckRequest()),
        (f"{HEALTH}/Watch", health_pb2.HealthCheckRequest()),
    ],
)
def test_what_breaks_inside_is_logged_and_not_told(
    path: Path, method: str, request_message: Message
) -> None:
    data = request_message.SerializeToString()
    with served(BrokenView(), path) as channel, capture_logs() as logs:
        error = failure(lambda: list(raw_stream(channel, method)(iter([data]))))

    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(error)
    (entry,) = logs
    assert entry["log_level"] == "error"
    assert "secret" in str(entry["exc_info"])


def test_a_deadline_ends_a_stream_and_nothing_else(channel: grpc.Channel) -> None:
    asked = threading.Event()

    def never() -> Iterator[bytes]:
        asked.wait()
        yield from ()

    error = failure(lambda: list(raw_stream(channel, f"{API}/LookupStream")(never(), timeout=0.1)))
    asked.set()

    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert answers(channel)


def test_a_client_that_does_not_read_its_list_costs_little_and_delays_nobody(path: Path) -> None:
    view = EndlessView(connection(10))
    with served(view, path) as channel, dialled(path) as lazy:
        pages = pb_grpc.PeerCredentialsStub(lazy).ListConnections(pb.ListConnectionsRequest())
        next(pages)
        # In as many turns of the event loop all 2,000 pages would have been made.
        for _ in range(1000):
            assert answers(channel)
        assert view.reads < 100_000
        pages.cancel()


def test_a_client_that_goes_away_in_the_middle_of_a_list_ends_it(path: Path) -> None:
    view = EndlessView(connection(10))
    with served(view, path) as channel, capture_logs() as logs:
        with dialled(path) as other:
            pages = pb_grpc.PeerCredentialsStub(other).ListConnections(pb.ListConnectionsRequest())
            for _ in itertools.islice(pages, 20):
                pass
        before = None
        while before != view.reads:
            before = view.reads
            for _ in range(20):
                assert answers(channel)
    assert view.reads < 200_000
    assert logs == []


def test_streams_that_stay_open_and_idle_take_no_place_from_others(
    channel: grpc.Channel, path: Path
) -> None:
    done = threading.Event()

    def one() -> Iterator[pb.LookupStreamRequest]:
        yield pb.LookupStreamRequest(key=FOUND)
        done.wait()

    with dialled(path) as other:
        stub = pb_grpc.PeerCredentialsStub(other)
        idle = [stub.LookupStream(one()) for _ in range(100)]
        for stream in idle:
            assert next(stream).result.found.peer.uid == 1000
        assert answers(channel)
        done.set()
        for stream in idle:
            assert list(stream) == []


def test_a_lookup_waits_for_parts_of_batches_and_not_for_whole_ones(path: Path) -> None:
    view = CountingView(connection(10))
    done = threading.Event()

    def batches() -> None:
        with dialled(path) as channel:
            data = pb.BatchLookupRequest(keys=[FOUND] * 1000).SerializeToString()
            while not done.is_set():
                raw_unary(channel, f"{API}/BatchLookup")(data)

    def keys_before_it(channel: grpc.Channel) -> int:
        before = view.finds
        assert answers(channel)
        return view.finds - before

    with served(view, path) as channel, ThreadPoolExecutor(8) as clients:
        running = [clients.submit(batches) for _ in range(8)]
        # The fastest of many, as this machine may be slow to ask or to listen.
        keys = [keys_before_it(channel) for _ in range(50)]
        done.set()
        for each in running:
            each.result()
    # Of the 8,000 in front of it; some turns of the event loop, one page of 100 in each.
    assert min(keys[10:]) < 1_000


def test_many_clients_at_once_each_get_their_own_answer(path: Path) -> None:
    view = MemoryView(
        *(connection(cookie, client_uid=cookie, client_port=cookie) for cookie in range(1, 41))
    )

    def right(cookie: int) -> bool:
        with dialled(path) as channel:
            stub = pb_grpc.PeerCredentialsStub(channel)
            request = pb.LookupRequest(key=pb.ConnectionKey(socket_cookie=cookie))
            return all(stub.Lookup(request).peer.uid == cookie for _ in range(20))

    with served(view, path), ThreadPoolExecutor(40) as clients:
        assert all(clients.map(right, range(1, 41)))


def test_the_socket_is_gone_after_the_end(view: MemoryView, path: Path) -> None:
    with served(view, path) as channel:
        assert answers(channel)
        assert path.is_socket()
    assert list(path.parent.iterdir()) == []


def test_the_end_waits_for_no_stream(
    view: MemoryView, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STOP_GRACE_SECONDS", 0.01)
    with dialled(path) as channel:
        with served(view, path):
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == SERVING
        assert failure(lambda: next(watch)).code() in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
        )


def test_a_call_under_way_at_the_end_is_finished(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STOP_GRACE_SECONDS", 60)
    view = MemoryView(*(connection(cookie) for cookie in range(1, 10_001)))

    def rest(pages: Iterator[pb.ListConnectionsResponse]) -> int:
        with suppress(ConnectionRefusedError, FileNotFoundError):
            while True:  # until it listens no more
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(path))
        return sum(len(page.connections) for page in pages)

    with dialled(path) as channel, ThreadPoolExecutor(1) as reader:
        with served(view, path):
            pages = pb_grpc.PeerCredentialsStub(channel).ListConnections(
                pb.ListConnectionsRequest()
            )
            first = len(next(pages).connections)
            count = reader.submit(rest, pages)
        assert first + count.result() == 10_000


def test_a_second_server_is_refused_and_the_first_goes_on(
    channel: grpc.Channel, view: MemoryView, path: Path
) -> None:
    with pytest.raises(ListenError, match=f"in use by process {os.getpid()}"), served(view, path):
        pass
    assert answers(channel)


def test_reflection_describes_all_that_is_served(channel: grpc.Channel) -> None:
    described = ProtoReflectionDescriptorDatabase(channel)

    assert set(described.get_services()) == {
        "peercred.v1.PeerCredentials",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    file = described.FindFileContainingSymbol("peercred.v1.PeerCredentials")
    assert file.name == "peercred/v1/peer_credentials.proto"


@pytest.mark.parametrize("service", ["", "peercred.v1.PeerCredentials"])
def test_health_is_asked_anew_each_time(
    channel: grpc.Channel, view: MemoryView, service: str
) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)

    assert stub.Check(request).status == SERVING
    view.attached = {"connect4": True, "sock_ops": False}
    assert stub.Check(request).status == NOT_SERVING
    assert stub.List(health_pb2.HealthListRequest()).statuses[service].status == NOT_SERVING
    view.attached = {}
    assert stub.Check(request).status == NOT_SERVING
    view.attached = {"connect4": True}
    assert stub.Check(request).status == SERVING
    assert stub.List(health_pb2.HealthListRequest()).statuses[service].status == SERVING


def test_health_of_an_unknown_service_is_not_found(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)

    error = failure(lambda: stub.Check(health_pb2.HealthCheckRequest(service="x")))

    assert error.code() == grpc.StatusCode.NOT_FOUND


def test_a_watch_gets_the_present_state_and_then_every_change(
    channel: grpc.Channel, view: MemoryView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "WATCH_INTERVAL_SECONDS", 0.01)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())

    assert next(watch).status == SERVING
    view.attached = {"connect4": False}
    assert next(watch).status == NOT_SERVING
    view.attached = {"connect4": True}
    assert next(watch).status == SERVING
    watch.cancel()


def test_a_watch_of_an_unknown_service_says_so_and_stays_open(
    channel: grpc.Channel, view: MemoryView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "WATCH_INTERVAL_SECONDS", 0.01)
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="x"), timeout=0.2
    )

    assert next(watch).status == SERVICE_UNKNOWN
    assert failure(lambda: next(watch)).code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_streams_beyond_their_limit_are_refused_and_lookups_answered(
    view: MemoryView, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_OPEN_STREAMS", 3)
    with served(view, path) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        streams = [watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        assert [next(stream).status for stream in streams] == [SERVING] * 3

        refused = failure(lambda: next(watch(health_pb2.HealthCheckRequest())))
        assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "ask with single calls" in str(refused.details())
        assert answers(channel)

        streams[0].cancel()
        while True:
            with suppress(grpc.RpcError):
                assert next(watch(health_pb2.HealthCheckRequest())).status == SERVING
                break
