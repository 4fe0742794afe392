"""What was there before the capture is said to be older, and never gets a name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import peercred
from harness import oracle, steps
from harness.acceptors import acceptor_of
from harness.actors import Actor
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.routes import USUAL
from harness.stage import Listener, Stage
from harness.steps import Both, Route
from harness.users import ALICE, BOB, SERVICE
from peercred import NotFound

pytestmark = pytest.mark.kernel

Scene = tuple[Listener, Actor, Both[int], Actor, Both[int]]


@pytest.fixture(params=USUAL, ids=str)
def scene(stage: Stage, request: pytest.FixtureRequest) -> Scene:
    """A listener, its accepted socket and its client."""
    route: Route = request.param
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    return listener, server, server(steps.accept, listener.fds), client, ends


@pytest.fixture
def late(scene: Scene, cgroup: Cgroup, daemon: Daemon) -> Iterator[peercred.Client]:
    """A client of a daemon that started after the scene was set."""
    with Daemon(cgroup, daemon.hook_set) as second, second.client() as client:
        yield client


def test_a_connection_older_than_the_capture_is_said_to_be_so_at_both_ends(
    scene: Scene, late: peercred.Client
) -> None:
    _, server, accepted, client, ends = scene
    for actor, fd in ((server, accepted.tcp), (client, ends.tcp)):
        with actor.borrow(fd) as sock:
            assert oracle.refusal(late, sock) == "OLDER_THAN_CAPTURE"
            local, remote = sock.getsockname(), sock.getpeername()
        with pytest.raises(NotFound) as refused:
            late.lookup_tuple(local, remote)
        assert refused.value.reason == "OLDER_THAN_CAPTURE"


def test_a_listener_older_than_the_capture_learns_who_connects_and_is_not_named(
    scene: Scene, late: peercred.Client, stage: Stage
) -> None:
    listener, server, *_ = scene
    bob = stage.actor(BOB)
    ends = stage.connect(bob, listener)
    accepted = server(steps.accept, listener.fds)
    with server.borrow(accepted.tcp) as sock:
        answer = oracle.tcp_answer(late, sock)
    assert (answer.pid, answer.uid) == (bob.pid, BOB)
    assert acceptor_of(answer) == stage.told(server, SERVICE)
    with bob.borrow(ends.tcp) as sock:
        assert oracle.refusal(late, sock) == "OLDER_THAN_CAPTURE"
    (recorded,) = late.connections(client_uid=BOB)
    assert recorded.listener is None
    assert recorded.listener_socket_cookie is None
