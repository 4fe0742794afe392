"""Several callers of one user on loopback TCP, in one process; each answer is checked.

Each has a connection of its own and one call under way. They share an event loop: with few CPUs,
as many processes would take from the server the time that is to be measured.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext
from itertools import cycle
from typing import NamedTuple

import grpc.aio

from bench.callers import key
from bench.child import Child, answer, orders
from bench.crowd import Question, question
from bench.table import Row, Target, Unit, Verdict
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as pb_grpc

# Or all channels of a process would share one connection.
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing leaves nothing in TIME_WAIT."""


class Taken(NamedTuple):
    """What all callers saw together."""

    elapsed_seconds: float
    times: list[float]
    """Of each right answer, in seconds."""
    wrong: int
    """Answers that name somebody else."""
    failed: int
    """Calls without an answer."""

    @property
    def per_second(self) -> float:
        """Right answers."""
        return len(self.times) / self.elapsed_seconds


class Modest(Child):
    """The process. `questions` are about connections that the user `uid` may learn about."""

    def __init__(self, address: str, uid: int, questions: Sequence[Question]) -> None:
        super().__init__("bench.modest", address, uid)
        self.tell(questions)

    def ask(self, kind: str, callers: int, seconds: float) -> Taken:
        """Ask about `questions` ("live"), or each time about a connection made for it ("new")."""
        self.tell((kind, callers, seconds))
        return Taken(*self.hear())


def title(callers: int) -> str:
    """So many callers, in words."""
    return "1 caller" if callers == 1 else f"{callers} callers"


RIGHT_OR_NOT = ("right", "wrong", "none")
"""The columns of `answers`."""


def answers(name: str, taken: Sequence[Taken]) -> Row:
    """How many answers were right; the others are what must not be."""
    right = sum(len(each.times) for each in taken)
    wrong, failed = sum(each.wrong for each in taken), sum(each.failed for each in taken)
    verdict = Verdict(wrong + failed, Unit.COUNT, Target(0))
    return Row(name, (right, wrong, failed), Unit.COUNT, verdict)


class _Callers:
    def __init__(self, address: str, asked: Callable[[], AbstractContextManager[Question]]) -> None:
        self._address = address
        self._asked = asked
        self._times: list[float] = []
        self._wrong = self._failed = 0

    async def ask(self, callers: int, seconds: float) -> Taken:
        async with AsyncExitStack() as stack:
            stubs = []
            for _ in range(callers):
                channel = grpc.aio.insecure_channel(self._address, options=OWN_CONNECTION)
                await stack.enter_async_context(channel)
                await channel.channel_ready()
                stubs.append(pb_grpc.PeerCredentialsStub(channel))
            begin = time.perf_counter()
            await asyncio.gather(*(self._ask_until(begin + seconds, stub) for stub in stubs))
            elapsed = time.perf_counter() - begin
        return Taken(elapsed, self._times, self._wrong, self._failed)

    async def _ask_until(self, end: float, stub: pb_grpc.PeerCredentialsAsyncStub) -> None:
        while time.perf_counter() < end:
            with self._asked() as asked:
                request = pb.LookupRequest(key=key(asked))
                start = time.perf_counter()
                try:
                    response = await stub.Lookup(request)
                except grpc.aio.AioRpcError:
                    self._failed += 1
                    continue
                spent = time.perf_counter() - start
                if (response.peer.uid, response.peer.pid) == (asked.uid, asked.pid):
                    self._times.append(spent)
                else:
                    self._wrong += 1


@contextmanager
def new_connection(listener: socket.socket) -> Iterator[Question]:
    """A connection of this process to itself."""
    with (
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as accepted,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        yield question(accepted, os.geteuid(), os.getpid())


def _obey(address: str, uid: int) -> None:
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    told = orders()
    live = cycle(
        [Question(tuple(local), tuple(remote), *rest) for local, remote, *rest in next(told)]
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kinds: dict[str, Callable[[], AbstractContextManager[Question]]] = {
            "live": lambda: nullcontext(next(live)),
            "new": lambda: new_connection(listener),
        }
        for kind, callers, seconds in told:
            answer(asyncio.run(_Callers(address, kinds[kind]).ask(callers, seconds)))


if __name__ == "__main__":
    _obey(sys.argv[1], int(sys.argv[2]))
