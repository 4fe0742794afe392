"""A full table loses the new record, says so, and never touches a live one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from harness import steps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon, drops, occupancy
from harness.routes import V4
from harness.stage import Stage
from harness.users import ALICE, BOB, SERVICE

pytestmark = pytest.mark.kernel

LIMIT = 4


@pytest.fixture
def crowded(hook_set: str) -> Iterator[Stage]:
    """A stage whose daemon has little room."""
    with ExitStack() as resources:
        cgroup = resources.enter_context(Cgroup())
        daemon = resources.enter_context(
            Daemon(
                cgroup,
                hook_set,
                f"--max-connections={LIMIT}",
                f"--max-pending={LIMIT}",
                "--max-percent-per-user=100",
            )
        )
        client = resources.enter_context(daemon.client())
        origin = resources.enter_context(Origin(cgroup))
        yield resources.enter_context(Stage(origin, client))


def test_a_full_table_of_connections_keeps_what_it_has_and_says_why_it_lacks_the_rest(
    crowded: Stage,
) -> None:
    server, first, late = (crowded.actor(uid) for uid in (SERVICE, ALICE, BOB))
    listener = crowded.listen(server, V4)
    for _ in range(LIMIT):
        crowded.connect(first, listener)
    kept = [server(steps.accept, listener.fds) for _ in range(LIMIT)]
    ends = crowded.connect(late, listener)
    lost = server(steps.accept, listener.fds)

    assert crowded.refusal(server, lost.tcp) == "TABLE_WAS_FULL"
    assert crowded.refusal(late, ends.tcp) == "TABLE_WAS_FULL"
    assert drops(crowded.client) == {"CONNECTIONS_FULL": 1}
    for accepted in kept:
        assert crowded.peer(server, accepted)[:2] == (first.pid, ALICE)


def test_a_table_has_room_again_when_connections_end(crowded: Stage) -> None:
    server, client = crowded.actor(SERVICE), crowded.actor(ALICE)
    listener = crowded.listen(server, V4)
    for _ in range(3 * LIMIT):
        ends = crowded.connect(client, listener)
        accepted = server(steps.accept, listener.fds)
        assert crowded.peer(server, accepted)[:2] == (client.pid, ALICE)
        client(steps.close, ends)
        server(steps.close, accepted)
    assert drops(crowded.client) == {}


def test_a_full_table_of_pending_connects_says_so_at_the_server(
    crowded: Stage,
) -> None:
    with (
        Cgroup() as other_cgroup,
        Origin(other_cgroup) as uncaptured,
        Stage(uncaptured, crowded.client) as outside,
    ):
        elsewhere = outside.listen(outside.actor(SERVICE), V4)
        server, client = crowded.actor(SERVICE), crowded.actor(ALICE)
        listener = crowded.listen(server, V4)
        # Their server sockets are born where nobody captures, so they stay pending.
        waiting = [crowded.connect(client, elsewhere) for _ in range(LIMIT)]
        assert occupancy(crowded.client)["pending"] == LIMIT
        crowded.connect(client, listener)
        accepted = server(steps.accept, listener.fds)

        assert crowded.refusal(server, accepted.tcp) == "TABLE_WAS_FULL"
        assert drops(crowded.client) == {"PENDING_FULL": 1}
        for ends in waiting:
            client(steps.write, ends)  # acknowledged, so there is a server socket
            client(steps.close, ends)
