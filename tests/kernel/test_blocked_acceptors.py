"""Tasks that have waited in accept() since before the capture: they make no lookup fail."""

from __future__ import annotations

import itertools
import os
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

import peercred
from harness import oracle, steps
from harness.acceptors import acceptor_of, told_acceptor
from harness.actors import Actor, Call, Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon, drops, wait_until_empty
from harness.patience import patient
from harness.routes import V4
from harness.syscalls import is_in
from harness.users import ALICE, BOB, SERVICE

pytestmark = pytest.mark.kernel

TASKS_OF_LISTENERS = (16, 16, 16, *[1] * 16)
"""64 in all."""
BLOCK_SECONDS = patient(30)


class Waiting:
    """A listener, and the tasks that wait in accept() on it."""

    def __init__(self, origin: Origin, tasks: int, exit_stack: ExitStack) -> None:
        server = exit_stack.enter_context(closing(origin.actor()))
        server(steps.become, SERVICE)
        fds = server(steps.bind, V4)
        server(steps.listen, fds)
        self.fd = fds.tcp
        self.address: Any = server(steps.addresses, fds, V4).tcp
        self.calls: dict[Actor, Call[int]] = {}
        for _ in range(tasks):
            worker = exit_stack.enter_context(closing(server.fork()))
            self.calls[worker] = worker.start(steps.accept_one, self.fd)

    def wait_until_blocked(self) -> None:
        deadline = time.monotonic() + BLOCK_SECONDS
        while not all(is_in("accept4", worker.pid) for worker in self.calls):
            assert time.monotonic() < deadline, "not all tasks wait in accept()"
            os.sched_yield()

    def accepted(self) -> tuple[Actor, int]:
        """The next worker to have accepted, and its new socket."""
        by_control = {worker.control: worker for worker in self.calls}
        (ready, *_), _, _ = select.select([*by_control], [], [])
        worker = by_control[ready]
        return worker, self.calls.pop(worker).result()


@pytest.fixture
def own_cgroup() -> Iterator[Cgroup]:
    with Cgroup() as cgroup:
        yield cgroup


def connect(client: Actor, address: object) -> int:
    """Connect; returns the new socket."""
    ends = client(steps.sockets, V4)
    client(os.close, ends.unix)
    client(steps.connect_one, ends.tcp, address)
    return ends.tcp


def ask(client: peercred.Client, actor: Actor, fd: int) -> peercred.PeerCredentials:
    with actor.borrow(fd) as sock:
        return oracle.tcp_answer(client, sock)


def test_with_64_tasks_blocked_in_accept_since_before_the_capture_every_answer_is_right(
    own_cgroup: Cgroup, hook_set: str
) -> None:
    with ExitStack() as exit_stack:
        origin = exit_stack.enter_context(Origin(own_cgroup))
        actors = exit_stack.enter_context(ExitStack())
        waiting = [Waiting(origin, tasks, actors) for tasks in TASKS_OF_LISTENERS]
        for each in waiting:
            each.wait_until_blocked()
        daemon = exit_stack.enter_context(Daemon(own_cgroup, hook_set))
        asking = exit_stack.enter_context(daemon.client())
        clients = {actors.enter_context(closing(origin.actor())): uid for uid in (ALICE, BOB)}
        for client, uid in clients.items():
            client(steps.become, uid)

        turns = [each for each in waiting for _ in each.calls]
        assert len(turns) == 64
        for each, (client, uid) in zip(turns, itertools.cycle(clients.items()), strict=False):
            connect(client, each.address)
            worker, accepted = each.accepted()
            answer = ask(asking, worker, accepted)
            assert (answer.pid, answer.uid) == (client.pid, uid)
            told = told_acceptor(hook_set, worker.pid, SERVICE)
            # A function that was entered before it was traced may return untraced.
            assert acceptor_of(answer) in (told, None)

            if not each.calls:
                connect(client, each.address)
                answer = ask(asking, worker, worker(steps.accept_one, each.fd))
                assert (answer.pid, answer.uid) == (client.pid, uid)
                assert acceptor_of(answer) == told

        assert drops(asking) == {}
        actors.close()
        wait_until_empty(asking)
