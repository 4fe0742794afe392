"""Only what stays on the host is recorded."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

import pytest

from harness import steps
from harness.netns import NetworkNamespace
from harness.routes import LAN_V4, LAN_V6
from harness.stage import Stage
from harness.steps import IPPROTO_MPTCP, Both, Route
from harness.users import ALICE, SERVICE

pytestmark = pytest.mark.kernel

NEIGHBOUR_V4 = "192.0.2.2"
NEIGHBOUR_V6 = "2001:db8::2"
V4, V6 = socket.AF_INET, socket.AF_INET6
LEAVING = [
    Route("v4", NEIGHBOUR_V4, NEIGHBOUR_V4, V4, V4),
    Route("v6", NEIGHBOUR_V6, NEIGHBOUR_V6, V6, V6),
    Route("v4-mapped", "::", f"::ffff:{NEIGHBOUR_V4}", V6, V6),
    Route("MPTCP", NEIGHBOUR_V4, NEIGHBOUR_V4, V4, V4, IPPROTO_MPTCP, IPPROTO_MPTCP),
]
NOBODY = [
    Route("v4", "192.0.2.3", "192.0.2.3", V4, V4),
    Route("v6", "2001:db8::3", "2001:db8::3", V6, V6),
]


@pytest.fixture
def cable(stage: Stage) -> tuple[NetworkNamespace, NetworkNamespace]:
    """Two hosts, with a cable between them."""
    host, neighbour = stage.namespace(), stage.namespace()
    host.connect_to(neighbour, f"{LAN_V4}/24", f"{NEIGHBOUR_V4}/24")
    host.add_address(f"{LAN_V6}/64", "cable")
    neighbour.add_address(f"{NEIGHBOUR_V6}/64", "cable")
    for each in (host, neighbour):
        each.sysctl("net.ipv4.tcp_fastopen", 0x607)
    return host, neighbour


@pytest.mark.parametrize("route", LEAVING, ids=str)
@pytest.mark.parametrize(
    "how",
    [steps.connect_one, steps.fast_open, steps.defer_and_write],
    ids=["connect", "Fast Open", "deferred Fast Open"],
)
def test_a_connect_that_leaves_the_host_leaves_nothing_in_any_table(
    stage: Stage,
    cable: tuple[NetworkNamespace, NetworkNamespace],
    route: Route,
    how: Callable[[int, Any], None],
) -> None:
    host, neighbour = cable
    server = stage.actor(SERVICE, namespace=neighbour)
    client = stage.actor(ALICE, namespace=host)
    listener = stage.listen(server, route)
    ends = client(steps.sockets, route)
    try:
        client(how, ends.tcp, listener.addresses.tcp)
    except OSError as error:
        # Debian 12's 6.1 has no Fast Open for MPTCP. What is refused leaves nothing either.
        if error.errno != errno.EOPNOTSUPP or route.client_protocol != IPPROTO_MPTCP:
            raise
        stage.assert_empty()
        return
    stage.assert_empty()
    accepted = server(steps.accept_one, listener.fds.tcp)
    stage.assert_empty()
    assert stage.refusal(server, accepted) in ("NEVER_SEEN", "NOT_LOCAL")
    assert stage.refusal(client, ends.tcp) in ("NEVER_SEEN", "NOT_LOCAL")
    server.exit()
    stage.assert_empty()
    client.exit()
    stage.assert_empty()


@pytest.mark.parametrize("route", NOBODY, ids=str)
def test_a_connect_to_another_host_that_does_not_answer_leaves_nothing_in_any_table(
    stage: Stage, cable: tuple[NetworkNamespace, NetworkNamespace], route: Route
) -> None:
    client = stage.actor(ALICE, namespace=cable[0])
    ends = client(steps.sockets, route)
    client(steps.start_connect, ends.tcp, (route.target, 7000))
    stage.assert_empty()
    client.kill()
    stage.assert_empty()


@pytest.mark.parametrize("address", [LAN_V4, LAN_V6])
def test_a_connect_to_the_hosts_own_lan_address_is_recorded(
    stage: Stage, cable: tuple[NetworkNamespace, NetworkNamespace], address: str
) -> None:
    family = V6 if ":" in address else V4
    route = Route("own address", address, address, family, family)
    server = stage.actor(SERVICE, namespace=cable[0])
    client = stage.actor(ALICE, namespace=cable[0])
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_socket_that_left_the_host_and_then_connects_locally_is_recorded(
    stage: Stage, cable: tuple[NetworkNamespace, NetworkNamespace]
) -> None:
    host, neighbour = cable
    far, near = stage.actor(SERVICE, namespace=neighbour), stage.actor(SERVICE, namespace=host)
    client = stage.actor(ALICE, namespace=host)
    listener = stage.listen(far, LEAVING[0])
    ends = client(steps.sockets, LEAVING[0])
    client(steps.connect_one, ends.tcp, listener.addresses.tcp)
    client(steps.disconnect, ends.tcp)
    local = stage.listen(near, Route("own address", LAN_V4, LAN_V4, V4, V4))
    client(steps.connect, Both(*ends), local.addresses)
    assert stage.peer(near, near(steps.accept, local.fds))[:2] == (client.pid, ALICE)
    client(steps.disconnect, ends.tcp)
    client(steps.connect_one, ends.tcp, listener.addresses.tcp)
    assert stage.refusal(client, ends.tcp) in ("NEVER_SEEN", "NOT_LOCAL", "RETIRED")
