"""Connections by the thousand that nobody takes, or that never end."""

from __future__ import annotations

import pytest

from harness import steps
from harness.daemon import occupancy
from harness.routes import V4
from harness.stage import Stage
from harness.steps import Option
from harness.users import ALICE, BOB, SERVICE

pytestmark = pytest.mark.kernel

COUNT = 2000
BACKLOG = 4096


@pytest.mark.parametrize(
    ("how", "options", "table"),
    [
        ("silent", (), "connections"),
        ("half-closed", (), "connections"),
        ("silent", (steps.DEFER_ACCEPT,), "pending"),
    ],
    ids=["never accepted", "half-closed", "half-open"],
)
def test_thousands_of_connections_that_nobody_takes_hide_no_other_and_go_with_their_user(
    stage: Stage, how: str, options: tuple[Option, ...], table: str
) -> None:
    namespace = stage.namespace()
    namespace.sysctl("net.core.somaxconn", BACKLOG)
    namespace.sysctl("net.ipv4.tcp_max_syn_backlog", BACKLOG)
    before = occupancy(stage.client)[table]
    flood_server = stage.actor(ALICE, namespace=namespace)
    flooder = stage.actor(ALICE, namespace=namespace)
    server = stage.actor(SERVICE, namespace=namespace)
    flooded = stage.listen(flood_server, V4, BACKLOG, options=options)
    listener = stage.listen(server, V4)
    flooder(steps.connect_many, flooded.addresses.tcp, COUNT, how)
    assert occupancy(stage.client)[table] >= before + COUNT

    client = stage.actor(BOB, namespace=namespace)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, BOB)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)
    flooder.exit()
    flood_server.exit()
    client.exit()
    server.exit()
    stage.wait_until_empty()
