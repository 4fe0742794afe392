"""The sweeper on the tables of a running capture, with everything old enough to go."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from harness import steps
from harness.actors import Actor
from harness.daemon import Daemon, occupancy
from harness.routes import USUAL, V4
from harness.stage import Stage
from harness.steps import Both, Route
from harness.users import ALICE, SERVICE

pytestmark = pytest.mark.kernel


def sweep(daemon: Daemon) -> dict[str, int]:
    """Sweep; returns what was done, without what was not."""
    arguments = {
        "pin_dir": str(daemon.pin_dir),
        "pending_age_seconds": 0,
        "record_age_seconds": 0,
    }
    command = [sys.executable, "-P", "-m", "peercredd.sweeper", json.dumps(arguments)]
    done: dict[str, int] = json.loads(subprocess.check_output(command))
    return {name: number for name, number in done.items() if number}


def close(actor: Actor, fd: int) -> None:
    actor(os.close, fd)


def reset(actor: Actor, fd: int) -> None:
    actor(steps.reset_delivered, fd)


def shut_down(actor: Actor, fd: int) -> None:
    actor(steps.shutdown, fd, socket.SHUT_WR)


@pytest.mark.parametrize("route", USUAL, ids=str)
@pytest.mark.parametrize("end", [shut_down, close, reset], ids=lambda end: end.__name__)
def test_a_server_keeps_its_answer_whatever_its_client_did(
    stage: Stage, daemon: Daemon, route: Route, end: Callable[[Actor, int], None]
) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    end(client, ends.tcp)
    server(steps.wait_until_hung_up, accepted.tcp)
    assert sweep(daemon) == {}
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


@pytest.mark.parametrize("route", USUAL, ids=str)
@pytest.mark.parametrize("end", [shut_down, close, reset], ids=lambda end: end.__name__)
def test_a_client_keeps_its_answer_whatever_its_server_did(
    stage: Stage, daemon: Daemon, route: Route, end: Callable[[Actor, int], None]
) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    end(server, accepted.tcp)
    client(steps.wait_until_hung_up, ends.tcp)
    assert sweep(daemon) == {}
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_connection_nobody_has_accepted_yet_stays(stage: Stage, daemon: Daemon) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    stage.connect(client, listener)
    client.exit()
    assert sweep(daemon) == {}
    assert stage.peer(server, server(steps.accept, listener.fds))[:2] == (client.pid, ALICE)


def test_what_was_reset_before_accept_stays_until_its_listener_goes(
    stage: Stage, daemon: Daemon
) -> None:
    server, first, second = stage.actor(SERVICE), stage.actor(ALICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    for client in (first, second):
        client(steps.reset_delivered, stage.connect(client, listener).tcp)
    assert sweep(daemon) == {}
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (first.pid, ALICE)
    server(steps.close, (*accepted, *listener.fds))
    assert sweep(daemon) == {"records_removed": 1}


def test_connections_in_another_namespace_stay(stage: Stage, daemon: Daemon) -> None:
    namespace = stage.namespace()
    server = stage.actor(SERVICE, namespace=namespace)
    client = stage.actor(ALICE, namespace=namespace)
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    assert sweep(daemon) == {}
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def established_without_server(stage: Stage, server: Actor, client: Actor) -> Both[int]:
    """A client that is connected to a socket that is born at its first byte, if ever."""
    deferred = (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)
    ends = stage.connect(client, stage.listen(server, V4, options=(deferred,)))
    assert client(steps.tcp_info, ends.tcp)[0] == steps.TCP_ESTABLISHED
    return ends


def test_a_connect_goes_when_its_client_is_gone_and_no_server_was_born(
    stage: Stage, daemon: Daemon
) -> None:
    client = stage.actor(ALICE)
    ends = established_without_server(stage, stage.actor(SERVICE), client)
    assert sweep(daemon) == {}
    assert occupancy(stage.client)["pending"] == 1
    client(steps.reset, ends.tcp)
    assert sweep(daemon) == {"pending_removed": 1}
    assert occupancy(stage.client)["pending"] == 0
