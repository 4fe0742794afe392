"""The figures of a running daemon, served by a process without privileges."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

import peercred
from harness import steps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.netns import NetworkNamespace
from harness.routes import V4
from harness.stage import Stage
from harness.users import ALICE, SERVICE

pytestmark = pytest.mark.kernel

ADDRESS = "127.0.0.1:9338"


def page() -> str:
    with urllib.request.urlopen(f"http://{ADDRESS}/metrics") as answer:
        text: str = answer.read().decode()
    return text


def test_what_a_daemon_does_is_counted_where_prometheus_asks(hook_set: str) -> None:
    options = (f"--metrics-address={ADDRESS}",)
    with (
        Cgroup() as cgroup,
        NetworkNamespace() as namespace,  # where nobody else has the port
        Daemon(cgroup, hook_set, *options, namespace=namespace) as daemon,
        daemon.client() as client,
        Origin(cgroup) as origin,
        Stage(origin, client) as stage,
    ):
        server, alice = stage.actor(SERVICE), stage.actor(ALICE)
        listener = stage.listen(server, V4)
        ends = stage.connect(alice, listener)
        accepted = server(steps.accept, listener.fds)
        with server.borrow(accepted.tcp) as sock:
            assert client.lookup(sock).uid == ALICE
        with pytest.raises(peercred.NotFound):
            client.lookup_cookie(2**63)  # the kernel counts from 1
        alice(steps.close, ends)
        server(steps.close, accepted)
        stage.wait_until_empty()

        values = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(namespace.run(page))
            for sample in family.samples
        }
        assert values["peercredd_connections_established_total",] == 1
        assert values["peercredd_connections_retired_total",] == 1
        assert values["peercredd_lookups_total", "FOUND"] == 1
        assert values["peercredd_lookups_total", "NEVER_SEEN"] == 1
        assert values["peercredd_call_duration_seconds_count", "Lookup"] == 2
        assert values["peercredd_table_entries", "connections"] == 0
        attached = [value for name, value in values.items() if "attached" in name[0]]
        assert attached
        assert all(attached)


def test_an_address_that_is_taken_ends_the_start_with_one_line(hook_set: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, Cgroup() as cgroup:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"metrics\.address: .*port {port}: .*in use"):
            Daemon(cgroup, hook_set, f"--metrics-address=127.0.0.1:{port}")
