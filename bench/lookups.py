"""One lookup, by us and by the rivals: how long it takes, and whether it is right."""

from __future__ import annotations

import pickle
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import count, cycle, islice
from queue import SimpleQueue
from typing import NamedTuple

import click
import grpc

from bench.callers import KEYS_PER_BATCH, key
from bench.crowd import FIRST_UID, Crowd, Question, question
from bench.daemon import running
from bench.effort import Effort
from bench.gone import Clients
from bench.rivals import RIVALS, Rival
from bench.table import Row, Section, Target, Unit, Verdict
from bench.timing import median_seconds
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as pb_grpc
from peercredd.records import V4_MAPPED
from peercredd.store import Answer, Store

GROWTH = Target(1.1)
CLIENT_UIDS = 4
STREAM_AHEAD = 100
QUESTIONS = 1_000

Uids = list[int | None]
Calls = tuple[Callable[[Sequence[Question]], Uids], Iterator[Sequence[Question]]]


class Method(NamedTuple):
    """A way to learn the uids of clients; `together` is how many it asks about at once."""

    name: str
    ask: Callable[[Sequence[Question]], Uids]
    together: int = 1
    target: Target | None = None


def measure(effort: Effort) -> list[Section]:
    """Ours on two daemons: `few` keeps the fewest sockets, while those of `many` grow."""
    with ExitStack() as stack:
        few, many = (_Site(stack) for _ in range(2))
        few.crowd.grow(effort.open_sockets[0])
        by_open_sockets = _by_open_sockets(effort, few, many)
    with ExitStack() as stack:
        return [by_open_sockets, _after_exit(effort, _Site(stack))]


class _Site:
    """A daemon, the sockets open in its cgroup, and the ways to ask it."""

    def __init__(self, stack: ExitStack) -> None:
        self.daemon = stack.enter_context(running())
        self.crowd = stack.enter_context(Crowd(self.daemon.cgroup))
        channel = stack.enter_context(grpc.insecure_channel(self.daemon.address))
        store = stack.enter_context(closing(Store(self.daemon.pin_dir)))
        self.methods = tuple(_ours(store, pb_grpc.PeerCredentialsStub(channel)))


def _ours(store: Store, stub: pb_grpc.PeerCredentialsStub) -> Iterator[Method]:
    def by_cookie(questions: Sequence[Question]) -> Uids:
        return [_uid_of_record(store.find_by_socket(each.cookie)) for each in questions]

    def by_tuple(questions: Sequence[Question]) -> Uids:
        return [
            _uid_of_record(
                store.find_by_tuple(
                    each.netns_cookie,
                    *(V4_MAPPED + socket.inet_aton(each.local[0]), each.local[1]),
                    *(V4_MAPPED + socket.inet_aton(each.remote[0]), each.remote[1]),
                )
            )
            for each in questions
        ]

    def lookup(questions: Sequence[Question]) -> Uids:
        (only,) = questions
        try:
            return [stub.Lookup(pb.LookupRequest(key=key(only))).peer.uid]
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return [None]
            raise

    def batch(questions: Sequence[Question]) -> Uids:
        request = pb.BatchLookupRequest(keys=[key(each) for each in questions])
        return [_uid_of_result(each) for each in stub.BatchLookup(request).results]

    requests: SimpleQueue[pb.LookupStreamRequest] = SimpleQueue()
    answers = stub.LookupStream(iter(requests.get, None))

    def stream(questions: Sequence[Question]) -> Uids:
        for each in questions:
            requests.put(pb.LookupStreamRequest(key=key(each)))
        return [_uid_of_result(answer.result) for answer in islice(answers, len(questions))]

    yield Method("peercredd's table in process, by cookie", by_cookie, target=GROWTH)
    yield Method("peercredd's table in process, by tuple", by_tuple, target=GROWTH)
    yield Method("peercredd Lookup", lookup, target=GROWTH)
    yield Method("peercredd BatchLookup of 1,000, each", batch, KEYS_PER_BATCH, GROWTH)
    yield Method(
        f"peercredd LookupStream, {STREAM_AHEAD} ahead, each", stream, STREAM_AHEAD, GROWTH
    )


def _uid_of_record(found: object) -> int | None:
    return found.peer.euid if isinstance(found, Answer) else None


def _uid_of_result(result: pb.LookupResult) -> int | None:
    return result.found.peer.uid if result.HasField("found") else None


def _of_rival(rival: Rival) -> Callable[[Sequence[Question]], Uids]:
    def ask(questions: Sequence[Question]) -> Uids:
        answers = [rival(each.local, each.remote) for each in questions]
        return [None if answer is None else answer.uid for answer in answers]

    return ask


RIVAL_METHODS = tuple(Method(name, _of_rival(rival)) for name, rival in RIVALS.items())


def _by_open_sockets(effort: Effort, few: _Site, many: _Site) -> Section:
    seconds = effort.seconds_per_method
    _, *more = effort.open_sockets
    times: dict[str, list[float]] = {method.name: [] for method in few.methods}
    for method in RIVAL_METHODS:
        times[method.name] = median_seconds(seconds, _calls(method, few.crowd))
    for sockets in more:
        many.crowd.grow(sockets)
        for on_few, on_many in zip(few.methods, many.methods, strict=True):
            # The last of the pairs, taken in turns, is the one that is compared.
            baseline, grown = (
                each / on_few.together
                for each in median_seconds(
                    seconds, _calls(on_few, few.crowd), _calls(on_many, many.crowd)
                )
            )
            times[on_few.name] = [baseline, *times[on_few.name][1:], grown]
        for method in RIVAL_METHODS:
            times[method.name] += median_seconds(seconds, _calls(method, many.crowd))
    rows = tuple(
        Row(
            method.name,
            tuple(times[method.name]),
            Unit.SECONDS,
            Verdict(times[method.name][-1] / times[method.name][0], target=method.target),
        )
        for method in (*few.methods, *RIVAL_METHODS)
    )
    columns = tuple(f"{sockets:,} sockets" for sockets in effort.open_sockets)
    return Section("Who is the client of one live connection?", columns, rows)


def _calls(method: Method, asked: Crowd) -> Calls:
    # As many objects of the benchmark's own for few connections as for many: a cold
    # cache shall be the table's doing.
    drawn = random.choices(asked.questions, k=QUESTIONS)
    questions = cycle([pickle.loads(pickle.dumps(each)) for each in drawn])
    sample = list(islice(questions, method.together))
    if method.ask(sample) != [each.uid for each in sample]:
        raise click.ClickException(f"{method.name}: wrong answer about a live connection")
    return method.ask, (list(islice(questions, method.together)) for _ in count())


def _after_exit(effort: Effort, site: _Site) -> Section:
    methods = [each for each in (*site.methods, *RIVAL_METHODS) if each.together == 1]
    outcomes = {method.name: Counter[str]() for method in methods}
    with (
        Clients(site.daemon.cgroup) as made,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        for number in range(effort.gone_clients):
            uid = FIRST_UID + number % CLIENT_UIDS
            pid = made.connect_and_exit(listener.getsockname(), uid)
            with listener.accept()[0] as accepted:
                asked = question(accepted, uid, pid)
                for method in methods:
                    outcomes[method.name][_outcome(method, asked)] += 1
    everyone = Target(effort.gone_clients, at_least=True)
    rows = tuple(
        Row(
            method.name,
            tuple(outcomes[method.name][outcome] for outcome in ("right", "wrong", "none")),
            Unit.COUNT,
            Verdict(
                outcomes[method.name]["right"], Unit.COUNT, everyone if method.target else None
            ),
        )
        for method in methods
    )
    title = f"The uid of {effort.gone_clients:,} clients that closed and exited"
    return Section(title, ("right", "wrong", "no answer"), rows)


def _outcome(method: Method, asked: Question) -> str:
    (uid,) = method.ask([asked])
    if uid is None:
        return "none"
    return "right" if uid == asked.uid else "wrong"
