from __future__ import annotations

import asyncio
import gc
from contextlib import closing
from typing import cast

import grpc.aio
import pytest

from harness.memory_events import MemoryEvents
from harness.memory_view import MemoryView, credentials
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1.peer_credentials_pb2_grpc import PeerCredentialsStub
from peercredd import callers, records
from peercredd.access import Policy, Refusals
from peercredd.callers import MAX_CALLS_PER_USER, MAX_LISTS_PER_USER, Callers, Context
from peercredd.server import Gate, Places, handlers
from peercredd.service import PeerCredentialsService, RequestError
from peercredd.store import Store
from peercredd.watching import Hub

ALICE, BOB = 1000, 2000
PORT = 338


class Table(MemoryView):
    """A connection of ALICE's from each port, but for those of others."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[int, int] = {}

    def newest(self, key: bytes) -> bytes:
        return key[:8]

    def record(self, server: bytes, key: bytes) -> bytes:
        *_, client_port, _ = records.TUPLE.unpack(key)
        client = credentials(self.owners.get(client_port, ALICE))
        head = records.CONNECTION_HEAD.pack(1, 2, 3, 4)
        return head.ljust(records.CLIENT_OFFSET, b"\0") + records.CREDENTIALS.pack(*client)


class Calls:
    """Calls to `Callers`, each in a task of its own, as gRPC has it."""

    def __init__(self) -> None:
        self.table = Table()
        self._callers = _callers(self.table)
        self._under_way: list[tuple[asyncio.Task[None], asyncio.Event]] = []
        self._kept: list[asyncio.Task[None]] = []

    async def begin(self, *, port: int = 50_000, lists: bool = False) -> bool:
        """Whether one more is let in; it is under way then."""
        begun: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        end = asyncio.Event()
        self._under_way.append((asyncio.create_task(self._call(port, lists, begun, end)), end))
        return await begun

    async def end(self, number: int, *, keep: bool) -> None:
        """Let gRPC be done with a call; the first is 0. Its task may be kept, as by a traceback."""
        task, end = self._under_way.pop(number)
        if keep:
            self._kept.append(task)
        end.set()
        await task

    async def _call(
        self, port: int, lists: bool, begun: asyncio.Future[bool], end: asyncio.Event
    ) -> None:
        class Call:
            def peer(self) -> str:
                return f"ipv4:127.0.0.1:{port}"

        try:
            self._callers.begin(cast(Context, Call()), lists)
        except RequestError:
            begun.set_result(False)
        except Exception as error:
            begun.set_exception(error)
        else:
            begun.set_result(True)
            await end.wait()


def _callers(table: Table) -> Callers:
    return Callers(
        cast(Store, table),
        PORT,
        Policy({}, {}),
        Refusals(),
        lambda view, access: PeerCredentialsService(view, access),
    )


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("ended", [0, MAX_CALLS_PER_USER // 2, MAX_CALLS_PER_USER - 1])
def test_a_call_counts_for_its_user_until_grpc_is_done_with_it(ended: int, keep: bool) -> None:
    async def test() -> None:
        calls = Calls()
        calls.table.owners[40_000] = BOB
        for _ in range(MAX_CALLS_PER_USER):
            assert await calls.begin()
        assert not await calls.begin()
        assert await calls.begin(port=40_000)

        await calls.end(ended, keep=keep)
        assert await calls.begin(port=50_001)
        assert not await calls.begin()

    asyncio.run(test())


def test_a_list_is_one_of_the_calls_too() -> None:
    async def test() -> None:
        calls = Calls()
        for _ in range(MAX_LISTS_PER_USER):
            assert await calls.begin(lists=True)
        assert not await calls.begin(lists=True)
        for _ in range(MAX_CALLS_PER_USER - MAX_LISTS_PER_USER):
            assert await calls.begin()
        assert not await calls.begin()

    asyncio.run(test())


def test_calls_of_a_connection_that_is_not_remembered_any_more_count_on() -> None:
    async def test() -> None:
        calls = Calls()
        for _ in range(MAX_CALLS_PER_USER):
            assert await calls.begin()
        for port in range(40_000, 40_000 + callers.MOST_REMEMBERED):
            calls.table.owners[port] = port
            assert await calls.begin(port=port)

        gc.collect()
        assert not await calls.begin()

    asyncio.run(test())


def test_calls_that_are_over_leave_nothing_to_the_garbage_collector() -> None:
    async def test() -> None:
        table = Table()
        gate = Gate(_callers(table).begin, Places(1), counts_early=True)
        server = grpc.aio.server(handlers=handlers(table, Hub(table, events), gate))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = PeerCredentialsStub(channel)
            await stub.WhoAmI(pb.WhoAmIRequest())
            gc.collect()
            gc.disable()
            try:
                for _ in range(50):
                    await stub.WhoAmI(pb.WhoAmIRequest())
                left = [each for each in gc.get_objects() if type(each).__name__ == "RPCState"]
            finally:
                gc.enable()
        await server.stop(None)
        assert len(left) < 10

    with closing(MemoryEvents()) as events:
        asyncio.run(test())
