"""A server that wants to be taken for somebody else, by clients that ask who listens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from harness import steps
from harness.actors import Actor
from harness.netns import NetworkNamespace
from harness.routes import V4, V6
from harness.stage import Stage
from harness.steps import Both, Route
from harness.users import ALICE, BOB, SERVICE

pytestmark = pytest.mark.kernel


def alone(stage: Stage) -> tuple[NetworkNamespace, tuple[Actor, ...]]:
    """A service, a squatter and a client, where nobody else takes a port."""
    namespace = stage.namespace()
    actors = (stage.actor(uid, namespace=namespace) for uid in (SERVICE, ALICE, BOB))
    return namespace, tuple(actors)


def uid_of_listener_in_proc_net_tcp(namespace: NetworkNamespace, port: int) -> int | None:
    """What /proc/net/tcp, and whoever reads it, says of who listens on a port."""
    text = namespace.run(Path("/proc/thread-self/net/tcp").read_text)
    for line in text.splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
            return int(fields[7])
    return None


def test_who_takes_the_port_of_a_listener_that_died_is_not_taken_for_it(
    stage: Stage, route: Route
) -> None:
    _, (service, squatter, client) = alone(stage)
    listener = stage.listen(service, route)
    before = stage.connect(client, listener)
    port = listener.addresses.tcp[1]
    service.exit()
    squatted = stage.listen(squatter, route, port=port)
    after = stage.connect(client, squatted)
    assert stage.peer(client, after)[:2] == (squatter.pid, ALICE)
    assert stage.peer(client, before)[:2] == (service.pid, SERVICE)


def test_who_gives_a_port_back_to_its_service_is_still_known_to_whom_he_deceived(
    stage: Stage,
) -> None:
    namespace, (service, squatter, client) = alone(stage)
    squatted = stage.listen(squatter, V4)
    port = squatted.addresses.tcp[1]
    ends = stage.connect(client, squatted)
    squatter(steps.close, squatted.fds)
    accepted_by_nobody = stage.listen(service, V4, port=port)
    assert uid_of_listener_in_proc_net_tcp(namespace, port) == SERVICE
    assert stage.peer(client, ends)[:2] == (squatter.pid, ALICE)
    service(steps.close, accepted_by_nobody.fds)


def test_who_listens_on_the_port_of_a_service_in_the_other_family_is_told_from_it(
    stage: Stage,
) -> None:
    _, (service, squatter, client) = alone(stage)
    listener = stage.listen(service, V6)
    port = listener.addresses.tcp[1]
    squatted = stage.listen(squatter, V4, port=port)
    # "localhost" is both.
    assert stage.peer(client, stage.connect(client, squatted))[:2] == (squatter.pid, ALICE)
    assert stage.peer(client, stage.connect(client, listener))[:2] == (service.pid, SERVICE)


def test_who_is_handed_the_socket_of_root_and_listens_is_not_taken_for_root(stage: Stage) -> None:
    namespace, (_, squatter, client) = alone(stage)
    root = stage.actor(namespace=namespace)
    bound = root(steps.bind, V4)
    fds = Both(*root.give(bound, to=squatter))
    root(steps.close, bound)
    squatter(steps.listen, fds)
    targets = squatter(steps.addresses, fds, V4)
    ends = client(steps.sockets, V4)
    client(steps.connect, ends, targets)
    assert uid_of_listener_in_proc_net_tcp(namespace, targets.tcp[1]) == 0
    assert stage.peer(client, ends)[:2] == (squatter.pid, ALICE)


def test_a_listener_that_shares_the_port_of_another_user_is_refused_by_the_kernel(
    stage: Stage,
) -> None:
    """What keeps a squatter off a port whose service runs, with SO_REUSEPORT on either side."""
    option = (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    service, squatter = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(service, V4, options=(option,))
    port = listener.addresses.tcp[1]
    for attempt in (Route("v4", "0.0.0.0", "127.0.0.1", V4.server_family, V4.client_family), V4):
        with pytest.raises(OSError, match="already in use"):
            squatter(steps.bind, attempt, port, (option,))
