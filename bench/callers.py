"""Processes that call a server as fast as it answers.

Each has one call under way at a time (a stream: WINDOW requests), so that the
number of callers is the load.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from queue import SimpleQueue
from typing import NamedTuple

import grpc
from google.protobuf.empty_pb2 import Empty

from bench.child import Child, answer, orders
from bench.crowd import Question
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as pb_grpc

EMPTY_METHOD = "/peercred.bench.Empty/Call"
KEYS_PER_BATCH = 1_000
WINDOW = 256


def key(question: Question) -> pb.ConnectionKey:
    """All that a client knows of its accepted socket, as the client library sends it."""
    return pb.ConnectionKey(
        socket_cookie=question.cookie,
        local=pb.Endpoint(address=question.local[0], port=question.local[1]),
        remote=pb.Endpoint(address=question.remote[0], port=question.remote[1]),
        netns_cookie=question.netns_cookie,
    )


class Stretch(NamedTuple):
    """What one caller saw."""

    calls: int
    calls_per_second: float
    median_seconds: float


class Caller(Child):
    """A process that calls the server at `address`, asking `questions` in turn."""

    def __init__(self, address: str, questions: Sequence[Question]) -> None:
        super().__init__("bench.callers", address)
        self.tell(questions)

    def start(self, kind: str, seconds: float) -> None:
        """Begin calls of one kind: empty, lookup, batch or stream."""
        self.tell((kind, seconds))

    def finish(self) -> Stretch:
        """Wait for their end."""
        return Stretch(*self.hear())


@contextmanager
def callers(number: int, address: str, questions: Sequence[Question]) -> Iterator[list[Caller]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Caller(address, questions)) for _ in range(number)]


def stretch(started: Sequence[Caller], kind: str, seconds: float) -> Stretch:
    """All callers at once: the sum of their rates, the median of their medians."""
    for caller in started:
        caller.start(kind, seconds)
    seen = [caller.finish() for caller in started]
    return Stretch(
        sum(each.calls for each in seen),
        sum(each.calls_per_second for each in seen),
        statistics.median(each.median_seconds for each in seen),
    )


def _one_by_one(call: Callable[[], object], seconds: float) -> Stretch:
    times = []
    begin = now = time.perf_counter()
    while now < begin + seconds:
        start = now
        call()
        now = time.perf_counter()
        times.append(now - start)
    return Stretch(len(times), len(times) / (now - begin), statistics.median(times))


class _Asking:
    """The calls of one caller, by kind."""

    def __init__(self, channel: grpc.Channel, questions: Sequence[Question]) -> None:
        self._stub = pb_grpc.PeerCredentialsStub(channel)
        self._empty = channel.unary_unary(
            EMPTY_METHOD,
            request_serializer=Empty.SerializeToString,
            response_deserializer=Empty.FromString,
        )
        keys = [key(question) for question in questions]
        self._requests = cycle([pb.LookupRequest(key=key) for key in keys])
        self._batch = pb.BatchLookupRequest(keys=islice(cycle(keys), KEYS_PER_BATCH))
        self._stream_requests = cycle([pb.LookupStreamRequest(key=key) for key in keys])

    def empty(self, seconds: float) -> Stretch:
        message = Empty()
        return _one_by_one(lambda: self._empty(message), seconds)

    def lookup(self, seconds: float) -> Stretch:
        return _one_by_one(lambda: self._stub.Lookup(next(self._requests)), seconds)

    def batch(self, seconds: float) -> Stretch:
        return _one_by_one(lambda: self._stub.BatchLookup(self._batch), seconds)

    def stream(self, seconds: float) -> Stretch:
        orders: SimpleQueue[pb.LookupStreamRequest | None] = SimpleQueue()
        answers = self._stub.LookupStream(iter(orders.get, None))
        sent: deque[float] = deque()
        times = []
        begin = now = time.perf_counter()
        for _ in range(WINDOW):
            orders.put(next(self._stream_requests))
            sent.append(now)
        for _ in answers:
            now = time.perf_counter()
            times.append(now - sent.popleft())
            if now < begin + seconds:
                orders.put(next(self._stream_requests))
                sent.append(now)
            elif not sent:
                orders.put(None)
        return Stretch(len(times), len(times) / (now - begin), statistics.median(times))


def _obey(address: str) -> None:
    told = orders()
    questions = [
        Question(tuple(local), tuple(remote), *rest) for local, remote, *rest in next(told)
    ]
    with grpc.insecure_channel(address) as channel:
        asking = _Asking(channel, questions)
        for kind, seconds in told:
            answer(getattr(asking, kind)(seconds))


if __name__ == "__main__":
    _obey(sys.argv[1])
