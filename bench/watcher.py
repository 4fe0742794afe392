"""A process with any number of watchers, that counts what they are told."""

from __future__ import annotations

import asyncio
import sys

import grpc.aio

from bench.child import Child, answer, orders
from bench.modest import OWN_CONNECTION
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as pb_grpc


class Watchers(Child):
    """The process. Everything is counted over all watchers, and since `watch`."""

    def __init__(self, address: str) -> None:
        super().__init__("bench.watcher", address)

    def watch(self, number: int) -> None:
        """Begin to watch; returns when all have the present state."""
        self.tell(("watch", number))
        self.hear()

    def until(self, events: int, seconds: float) -> tuple[int, int]:
        """Wait until there were that many events, or as many were missed, or it takes too long.

        Returns:
            How many there were, and how many connections the daemon said it could not tell of.
        """
        self.tell(("until", events, seconds))
        told, missed = self.hear()
        return told, missed

    def end(self) -> None:
        """Watch no more."""
        self.tell(("end",))
        self.hear()


class _Watching:
    def __init__(self, address: str) -> None:
        self._address = address
        self._tasks: list[asyncio.Task[None]] = []
        self._events = 0
        self._missed: dict[int, int] = {}

    async def watch(self, number: int) -> None:
        self._events, self._missed = 0, {}
        ready = asyncio.Barrier(number + 1)
        self._tasks = [asyncio.create_task(self._watch(each, ready)) for each in range(number)]
        await ready.wait()
        answer(None)

    async def until(self, events: int, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        # A connection that was missed is missed at its end, too.
        while self._events + 2 * sum(self._missed.values()) < events:
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.01)
        answer((self._events, sum(self._missed.values())))

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        answer(None)

    async def _watch(self, number: int, ready: asyncio.Barrier) -> None:
        async with grpc.aio.insecure_channel(self._address, options=OWN_CONNECTION) as channel:
            stub = pb_grpc.PeerCredentialsStub(channel)
            is_synchronized = False
            async for response in stub.WatchConnections(pb.WatchConnectionsRequest()):
                if is_synchronized:
                    self._events += len(response.events)
                    self._missed[number] = response.missed
                elif response.synchronized:
                    is_synchronized = True
                    await ready.wait()


async def _obey(address: str) -> None:
    watching, told = _Watching(address), orders()
    while order := await asyncio.to_thread(next, told, None):
        await getattr(watching, order[0])(*order[1:])


if __name__ == "__main__":
    asyncio.run(_obey(sys.argv[1]))
