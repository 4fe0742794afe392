"""Two captures at once, one with each hook set: after the same deeds, the same records."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from harness import shares, steps
from harness.actors import Actor, Origin
from harness.cgroup import Cgroup
from harness.daemon import RECORD_TABLES, Daemon, drops
from harness.patience import patient
from harness.routes import MULTIPATH, USUAL, V4
from harness.stage import Listener, Stage
from harness.steps import Both
from harness.users import ALICE, BOB, SERVICE
from peercredd import hooks, pins, records
from peercredd.libbpf import Map

pytestmark = [pytest.mark.kernel, pytest.mark.hook_sets("trace")]

AGREE_SECONDS = patient(10)
FAST_OPEN = 0x607

Records = dict[str, dict[str, object]]
TABLES = (*RECORD_TABLES, "reset_in_queue")


class Twins:
    """Two daemons on one cgroup."""

    def __init__(self, cgroup: Cgroup, exit_stack: ExitStack) -> None:
        self.daemons = {
            hook_set: exit_stack.enter_context(Daemon(cgroup, hook_set))
            for hook_set in hooks.HOOK_SETS
        }
        self.clients = {
            hook_set: exit_stack.enter_context(daemon.client())
            for hook_set, daemon in self.daemons.items()
        }
        self._tables: dict[str, dict[str, Map]] = {}
        for hook_set, daemon in self.daemons.items():
            maps = daemon.pin_dir / pins.CAPTURE / pins.MAPS
            self._tables[hook_set] = {name: Map.open(maps / name) for name in TABLES}
            for table in self._tables[hook_set].values():
                exit_stack.callback(table.close)

    def records(self) -> Records:
        """What both captures have; raises AssertionError if they keep having different things.

        One may be told of an event a moment before the other.
        """
        deadline = time.monotonic() + AGREE_SECONDS
        while True:
            traced, grouped = map(self._records, hooks.HOOK_SETS)
            if traced == grouped:
                return traced
            if time.monotonic() > deadline:
                assert traced == grouped
            os.sched_yield()

    def _records(self, hook_set: str) -> Records:
        charged = shares.charged(self.daemons[hook_set])
        decode: dict[str, Callable[[bytes], object]] = {
            "pending": pending,
            "connections": connection,
            "by_tuple": bytes.hex,
            "by_client": bytes.hex,
            "reset_in_queue": bytes.hex,
        }
        return {
            "users": {str(uid): counts for uid, counts in charged.users.items()},
            "left": {str(pair): count for pair, count in charged.left.items()},
            **{
                name: {key.hex(): decode[name](value) for key, value in table.items()}
                for name, table in self._tables[hook_set].items()
            },
        }

    def sweep(self) -> None:
        """Remove what no event told of."""
        for daemon in self.daemons.values():
            arguments = {
                "pin_dir": str(daemon.pin_dir),
                "pending_age_seconds": 0,
                "record_age_seconds": 0,
            }
            command = [sys.executable, "-P", "-m", "peercredd.sweeper", json.dumps(arguments)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def pending(value: bytes) -> object:
    """All but the times."""
    _, client, initial_sequence, client_gone = records.PENDING_HEAD.unpack_from(value)
    return (
        *(client, initial_sequence, bool(client_gone)),
        untimed(records.credentials(value, records.PENDING_HEAD.size)),
    )


def connection(value: bytes) -> object:
    """All but the times and the acceptor."""
    decoded = records.connection(value)
    if decoded is None:
        return "is being written"
    return (
        *(decoded.tuple, records.ends(value), decoded.server_socket_cookie),
        *(decoded.client_socket_cookie, decoded.listener_socket_cookie),
        untimed(decoded.client),
        decoded.listener and untimed(decoded.listener),
    )


def untimed(credentials: records.Credentials) -> records.Credentials:
    return credentials._replace(time_ns=0)


@pytest.fixture
def twins(hook_set: str) -> Iterator[tuple[Twins, Stage]]:
    with ExitStack() as resources:
        cgroup = resources.enter_context(Cgroup())
        twins = Twins(cgroup, resources)
        origin = resources.enter_context(Origin(cgroup))
        stage = Stage(origin, twins.clients[hook_set])
        yield twins, resources.enter_context(stage)


def test_the_same_deeds_leave_the_same_records(twins: tuple[Twins, Stage]) -> None:
    both, stage = twins
    namespace = stage.namespace()
    namespace.sysctl("net.ipv4.tcp_fastopen", FAST_OPEN)

    def actor(uid: int) -> Actor:
        return stage.actor(uid, groups=(uid + 1, uid + 2), namespace=namespace)

    server, client, other = actor(SERVICE), actor(ALICE), actor(BOB)
    listeners = [stage.listen(server, route) for route in USUAL]
    assert not any(both.records().values())

    # Each twice: once accepted, and once left in the queue.
    for listener in listeners:
        play_every_shape(stage, listener, server, client, other, accepts=True)
        assert both.records()["connections"]
        play_every_shape(stage, listener, server, client, other, accepts=False)
        assert both.records()["by_client"]

    unborn = stage.listen(server, V4, options=(steps.DEFER_ACCEPT,))
    ends = stage.connect(client, unborn)
    assert both.records()["pending"]
    stage.connect(other, unborn)
    client(steps.write, ends)
    both.records()

    play_reused_tuples(stage, listeners[0], server, client, other)
    both.records()
    play_disconnected(stage, listeners[0], server, client, other)
    both.records()
    for route in MULTIPATH:
        listener = stage.listen(server, route)
        stage.connect(client, listener)
        server(steps.accept, listener.fds)
        stage.connect(client, listener)
    assert len(both.records()["connections"]) > 60

    other.exit()
    both.records()
    client.kill()
    both.records()
    server.exit()
    both.records()
    both.sweep()
    assert not any(both.records().values())
    assert drops(both.clients["trace"]) == drops(both.clients["cgroup"])


def play_every_shape(
    stage: Stage,
    listener: Listener,
    server: Actor,
    client: Actor,
    other: Actor,
    accepts: bool,
) -> None:
    def connect(how: Any = steps.connect) -> tuple[Both[int], int | None]:
        ends = stage.connect(client, listener, how)
        if how is steps.connect_deferred:
            (theirs,) = client.give([ends.tcp], to=other)
            other(os.write, theirs, b"x")
        if not accepts:
            return ends, None
        server(steps.accept_one, listener.fds.unix)
        return ends, server(steps.accept_one, listener.fds.tcp)

    connect()
    connect(steps.connect_nonblocking)
    connect(steps.connect_fast_open)
    connect(steps.connect_deferred)

    ends, accepted = connect()
    client(steps.shutdown, ends.tcp, socket.SHUT_WR)

    for data in (b"", b"unread"):
        ends, accepted = connect()
        if data:
            client(os.write, ends.tcp, data)
        client(steps.reset_delivered, ends.tcp)

    ends, _ = connect()
    client(os.close, ends.tcp)

    ends, accepted = connect()
    if accepted is not None:
        server(steps.shutdown, accepted, socket.SHUT_WR)
        client(steps.wait_until_hung_up, ends.tcp)
        ends, accepted = connect()
        assert accepted is not None
        server(steps.reset, accepted)
        client(steps.wait_until_hung_up, ends.tcp)
        ends, accepted = connect()
        assert accepted is not None
        server(os.close, accepted)
        ends, accepted = connect()
        assert accepted is not None
        client(os.close, ends.tcp)
        server(os.close, accepted)


def play_reused_tuples(
    stage: Stage, listener: Listener, server: Actor, client: Actor, other: Actor
) -> None:
    ends = stage.connect(client, listener, local=(listener.route.target, 0))
    name = client(steps.own_name, ends.tcp)
    accepted = accept_all(server, listener)
    client(steps.reset, ends.tcp)
    server(steps.wait_until_hung_up, accepted)
    stage.connect(other, listener, local=name)
    accept_all(server, listener)


def play_disconnected(
    stage: Stage, listener: Listener, server: Actor, client: Actor, other: Actor
) -> None:
    accept_all(server, listener)
    ends = stage.connect(client, listener)
    accepted = accept_all(server, listener)
    client(steps.disconnect, ends.tcp)
    client(steps.connect_one, ends.tcp, listener.addresses.tcp)
    server(steps.disconnect, accepted)
    (tcp,) = client.give([ends.tcp], to=other)
    other(steps.disconnect, tcp)
    other(steps.connect_one, tcp, listener.addresses.tcp)
    accept_all(server, listener)


def accept_all(server: Actor, listener: Listener) -> int:
    """Accept whatever is in the TCP queue; returns the last."""
    accepted = -1
    while server(steps.readable, listener.fds.tcp):
        accepted = server(steps.accept_one, listener.fds.tcp)
    return accepted
