from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from harness.memory_events import MemoryEvents
from harness.memory_view import MemoryView, connection
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1.peer_credentials_pb2_grpc import PeerCredentialsStub
from peercredd import server
from peercredd.server import Gate, Places
from peercredd.service import PeerCredentialsService
from peercredd.watching import Hub

LOOKUP = "/peercred.v1.PeerCredentials/Lookup"
ASKED = pb.LookupRequest(key=pb.ConnectionKey(socket_cookie=10)).SerializeToString()
CALL_SECONDS = 60


@pytest.fixture
def heard() -> list[str]:
    """From whom messages of streams have come."""
    return []


@pytest.fixture
def channel(tmp_path: Path, heard: list[str]) -> Iterator[grpc.Channel]:
    """To a server that counts calls before their message has come, as on loopback TCP."""
    address = f"unix:{tmp_path}/s"
    started: Future[Callable[[], object]] = Future()
    view = MemoryView(connection(10))
    service = PeerCredentialsService(view)

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        gate = Gate(
            lambda _context, _lists: service, Places(8), counts_early=True, heard=heard.append
        )
        served = grpc.aio.server(handlers=server.handlers(view, Hub(view, events), gate))
        served.add_insecure_port(address)
        await served.start()
        started.set_result(lambda: loop.call_soon_threadsafe(stop.set))
        await stop.wait()
        await served.stop(None)

    with closing(MemoryEvents()) as events, ThreadPoolExecutor(1) as thread:
        ended = thread.submit(asyncio.run, main())
        first: Future[Any] = next(as_completed((started, ended)))
        stop = first.result()
        try:
            with grpc.insecure_channel(address) as channel:
                yield channel
        finally:
            stop()
            ended.result()


class SlowCall:
    """A Lookup whose message comes when it is sent, or never."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._message = threading.Event()
        call: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(LOOKUP)
        self.future = call.future(self._messages(), timeout=CALL_SECONDS)

    def send(self) -> pb.LookupResponse:
        self._message.set()
        return pb.LookupResponse.FromString(self.future.result())

    def fails(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as raised:
            self.future.result()
        self._message.set()
        assert isinstance(raised.value, grpc.Call)
        return raised.value.code(), raised.value.details()

    def _messages(self) -> Iterator[bytes]:
        self._message.wait()
        yield ASKED


def lookup(channel: grpc.Channel) -> pb.LookupResponse:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(LOOKUP)
    return pb.LookupResponse.FromString(call(ASKED, timeout=CALL_SECONDS))


def test_each_call_whose_message_does_not_come_is_ended_and_no_other(
    channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.2)
    # The second time nothing is left of the first one's timer.
    for _ in range(2):
        silent = SlowCall(channel), SlowCall(channel)
        assert lookup(channel).peer.uid == 1000
        for each in silent:
            code, details = each.fails()
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "did not come" in details
    assert lookup(channel).peer.uid == 1000


def test_a_message_may_come_later_than_its_call(channel: grpc.Channel) -> None:
    waiting = SlowCall(channel)
    assert lookup(channel).peer.uid == 1000
    assert waiting.send().peer.uid == 1000


def test_of_each_message_of_a_stream_it_is_told_from_whom_it_came(
    channel: grpc.Channel, heard: list[str]
) -> None:
    stub = PeerCredentialsStub(channel)
    requests = [pb.LookupStreamRequest(key=pb.ConnectionKey(socket_cookie=10))] * 3

    assert len(list(stub.LookupStream(iter(requests), timeout=CALL_SECONDS))) == 3
    assert heard == ["unix:"] * 3


class ClosedCall:
    """What gRPC gives a handler, of a call that its caller closes before the answer."""

    async def read(self) -> object:
        return grpc.aio.EOF

    async def abort(self, *_status: object) -> None:
        raise grpc.aio.InternalError


def test_a_call_that_is_closed_while_it_is_refused_ends_as_a_cancelled_one_does() -> None:
    # Of any other exception gRPC writes a traceback into the log: strangers could fill it.
    service = PeerCredentialsService(MemoryView())
    gate = Gate(lambda _context, _lists: service, Places(8), counts_early=True)

    async def messages() -> AsyncIterator[bytes]:
        yield b"never read"

    async def call() -> None:
        with closing(MemoryEvents()) as events:
            handlers = server.handlers(MemoryView(), Hub(MemoryView(), events), gate)
            details = SimpleNamespace(method=LOOKUP, invocation_metadata=())
            found = (each.service(cast(grpc.HandlerCallDetails, details)) for each in handlers)
            handler: Any = next(filter(None, found))
            await handler.stream_unary(messages(), ClosedCall())

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(call())
