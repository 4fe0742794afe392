from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from harness.canned_daemon import CannedDaemon, found
from peercred import AsyncClient, PeerCredError
from peercred.v1 import peer_credentials_pb2 as pb


@asynccontextmanager
async def made(folder: Path) -> AsyncIterator[tuple[CannedDaemon, AsyncClient]]:
    with CannedDaemon(f"unix:{folder}/s") as canned:
        async with AsyncClient(canned.address) as client:
            yield canned, client


async def waiting(canned: CannedDaemon) -> None:
    assert await asyncio.to_thread(canned.waiting.wait, 60)


def test_without_an_event_loop_it_says_where_to_make_one() -> None:
    with pytest.raises(PeerCredError, match="no event loop runs"):
        AsyncClient("unix:/x")


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_tasks_can_share_a_client_and_each_gets_its_own_answer(
    tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def ask() -> None:
        async with made(tmp_path) as (canned, client):
            canned.answers = {cookie: found(cookie) for cookie in range(500)}
            answers = await asyncio.gather(*map(client.lookup_cookie, range(500)))
            assert [answer.server_socket_cookie for answer in answers] == list(range(500))

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ask())


def test_a_call_under_way_fails_when_the_client_is_closed(tmp_path: Path) -> None:
    async def ask() -> None:
        async with made(tmp_path) as (canned, client):
            canned.release.clear()
            asking = asyncio.create_task(client.lookup_cookie(1))
            await waiting(canned)
            await client.close()
            with pytest.raises(PeerCredError, match="closed during the call"):
                await asking

    asyncio.run(ask())


def test_a_listing_under_way_fails_when_the_client_is_closed(tmp_path: Path) -> None:
    async def ask() -> None:
        async with made(tmp_path) as (canned, client):
            canned.release.clear()
            asking = asyncio.ensure_future(anext(client.connections()))
            await waiting(canned)
            await client.close()
            with pytest.raises(PeerCredError, match="closed during the call"):
                await asking

    asyncio.run(ask())


def test_a_task_that_is_cancelled_while_it_asks_is_cancelled(tmp_path: Path) -> None:
    async def ask() -> None:
        async with made(tmp_path) as (canned, client):
            canned.release.clear()
            asking = asyncio.create_task(client.lookup_cookie(1))
            await waiting(canned)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            canned.release.set()
            await client.status()

    asyncio.run(ask())


def test_a_timeout_of_the_callers_own_stays_one(tmp_path: Path) -> None:
    async def ask() -> None:
        async with made(tmp_path) as (canned, client):
            canned.release.clear()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await anext(client.connections())

    asyncio.run(ask())


def test_a_listing_that_is_left_early_leaves_the_client_usable(tmp_path: Path) -> None:
    async def ask() -> None:
        async with made(tmp_path) as (canned, client):
            connection = pb.Connection(
                client=pb.Credentials(pid=1, uid=2, gid=3),
                client_endpoint=pb.Endpoint(address="::1", port=1),
                server_endpoint=pb.Endpoint(address="::1", port=2),
            )
            canned.pages = [pb.ListConnectionsResponse(connections=[connection] * 2)] * 9
            async for listed in client.connections():
                assert listed.client.uid == 2
                break
            await client.status()

    asyncio.run(ask())
