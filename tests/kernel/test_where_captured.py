"""Whose connections are captured: those of a cgroup and below, or all of the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from harness import steps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.requirements import CAPTURE_THE_HOST
from harness.routes import V4, V6
from harness.stage import Stage
from harness.steps import Route
from harness.users import ALICE, SERVICE

pytestmark = pytest.mark.kernel


@pytest.fixture
def exit_stack() -> Iterator[ExitStack]:
    with ExitStack() as exit_stack:
        yield exit_stack


def check_both_ends_are_known(stage: Stage, route: Route, elsewhere: bool = False) -> None:
    namespace = stage.namespace() if elsewhere else None
    server = stage.actor(SERVICE, namespace=namespace)
    client = stage.actor(ALICE, namespace=namespace)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


@pytest.mark.parametrize("depth", [1, 3])
def test_connections_made_in_a_cgroup_below_are_captured(
    daemon: Daemon, cgroup: Cgroup, exit_stack: ExitStack, depth: int
) -> None:
    below = cgroup
    for _ in range(depth):
        below = exit_stack.enter_context(Cgroup(below))
    origin = exit_stack.enter_context(Origin(below))
    client = exit_stack.enter_context(daemon.client())
    check_both_ends_are_known(exit_stack.enter_context(Stage(origin, client)), V4)


@pytest.mark.parametrize("place", ["beside", "above"])
def test_connections_made_in_a_cgroup_beside_or_above_are_not_captured(
    hook_set: str, exit_stack: ExitStack, place: str
) -> None:
    above = exit_stack.enter_context(Cgroup())
    captured, beside = (exit_stack.enter_context(Cgroup(above)) for _ in range(2))
    # A cgroup with processes of its own has none with controllers below it; these have none.
    origin = exit_stack.enter_context(Origin(beside if place == "beside" else above))
    daemon = exit_stack.enter_context(Daemon(captured, hook_set))
    stage = exit_stack.enter_context(Stage(origin, exit_stack.enter_context(daemon.client())))
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    stage.assert_empty()
    assert stage.refusal(server, accepted.tcp) == "NEVER_SEEN"
    assert stage.refusal(client, ends.tcp) == "NEVER_SEEN"


@pytest.mark.hook_sets(*CAPTURE_THE_HOST)
@pytest.mark.parametrize("route", [V4, V6], ids=str)
def test_on_the_root_cgroup_connections_of_every_cgroup_and_namespace_are_captured(
    hook_set: str, exit_stack: ExitStack, route: Route
) -> None:
    before = exit_stack.enter_context(Cgroup())
    daemon = exit_stack.enter_context(Daemon(None, hook_set))
    after = exit_stack.enter_context(Cgroup(exit_stack.enter_context(Cgroup())))
    client = exit_stack.enter_context(daemon.client())
    for place in (before, after, None):
        origin = exit_stack.enter_context(Origin(place))
        # The connections of all that runs here are captured too, so the tables are not empty.
        stage = exit_stack.enter_context(Stage(origin, client, alone=False))
        check_both_ends_are_known(stage, route)
        check_both_ends_are_known(stage, route, elsewhere=True)
