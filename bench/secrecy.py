"""What time tells a caller of connections that are not its own: those there are, and none."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing

import grpc
from google.rpc import code_pb2

from bench.callers import key
from bench.child import Child, answer, orders
from bench.crowd import FIRST_UID, Crowd, Question
from bench.daemon import TCP_ADDRESS, Daemon
from bench.effort import Effort
from bench.table import Row, Section, Target, Unit, Verdict
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as pb_grpc
from peercredd.access import Caller, OwnView, Refusals
from peercredd.service import PeerCredentialsService, RequestError
from peercredd.store import Store

STRANGER = FIRST_UID - 1
SOCKETS = 1_000
IN_THE_DAEMON, OVER_TCP = Target(1.05), Target(1.02)
ABSENT, FORBIDDEN = "absent", "of others"
BY_SOCKET, BY_TUPLE = "by cookie", "by tuple"
NO_COOKIES = 1 << 63
"""From there on."""


_Asked = Mapping[str, Sequence[Question]]
_Times = dict[str, list[float]]


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    """Ask for connections of others and for such as do not exist, in an order left to chance."""
    with ExitStack() as stack:
        crowd = stack.enter_context(Crowd(daemon.cgroup))
        crowd.grow(SOCKETS)
        asked = {
            FORBIDDEN: crowd.questions,
            ABSENT: [_absent(each, number) for number, each in enumerate(crowd.questions)],
        }
        asker = stack.enter_context(Child("bench.secrecy", TCP_ADDRESS, STRANGER))
        asker.tell(asked)
        rows = []
        for how in (BY_SOCKET, BY_TUPLE):
            within = _within_the_daemon(daemon, crowd.questions[0], asked, how, effort.secret_calls)
            asker.tell((how, effort.secret_calls))
            rows += [
                _row(f"in the daemon, {how}", within, IN_THE_DAEMON),
                _row(f"over TCP, {how}", asker.hear(), OVER_TCP),
            ]
    return [Section("Lookup of what is not the caller's", (ABSENT, FORBIDDEN), tuple(rows))]


def _absent(question: Question, number: int) -> Question:
    return question._replace(cookie=NO_COOKIES + number, remote=(question.remote[0], 1 + number))


def _request(question: Question, how: str) -> pb.LookupRequest:
    whole = key(question)
    part = (
        pb.ConnectionKey(socket_cookie=whole.socket_cookie)
        if how == BY_SOCKET
        else pb.ConnectionKey(local=whole.local, remote=whole.remote)
    )
    return pb.LookupRequest(key=part)


def _within_the_daemon(
    daemon: Daemon, present: Question, asked: _Asked, how: str, calls: int
) -> _Times:
    with closing(Store(daemon.pin_dir)) as store:
        caller = Caller(STRANGER, present.cookie)
        view = OwnView(store, caller, Refusals(), listener_details=False)
        service = PeerCredentialsService(view, daemon_pid=os.getpid())

        def is_refused(request: pb.LookupRequest) -> bool:
            try:
                service.lookup(request)
            except RequestError as error:
                return bool(error.status.code == code_pb2.NOT_FOUND)
            return False

        return _times(is_refused, asked, how, calls)


def _times(
    is_refused: Callable[[pb.LookupRequest], bool], asked: _Asked, how: str, calls: int
) -> _Times:
    """How many seconds each answer took, with and without such a connection."""
    order = random.Random(calls)
    times: _Times = {what: [] for what in asked}
    for number in range(calls):
        for what in order.sample(list(asked), len(asked)):
            request = _request(asked[what][number % len(asked[what])], how)
            start = time.perf_counter()
            refused = is_refused(request)
            times[what].append(time.perf_counter() - start)
            if not refused:
                raise SystemExit(f"a stranger was answered: {request}")
    return times


def _row(name: str, times: _Times, target: Target) -> Row:
    absent, forbidden = (statistics.median(times[what]) for what in (ABSENT, FORBIDDEN))
    slower, faster = max(absent, forbidden), min(absent, forbidden)
    return Row(name, (absent, forbidden), Unit.SECONDS, Verdict(slower / faster, target=target))


def _obey(address: str, uid: int) -> None:
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    told = orders()
    asked = {
        what: [Question(tuple(local), tuple(remote), *rest) for local, remote, *rest in each]
        for what, each in next(told).items()
    }
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.PeerCredentialsStub(channel)

        def is_refused(request: pb.LookupRequest) -> bool:
            return stub.Lookup.future(request).code() is grpc.StatusCode.NOT_FOUND

        for how, calls in told:
            answer(_times(is_refused, asked, how, calls))


if __name__ == "__main__":
    _obey(sys.argv[1], int(sys.argv[2]))
