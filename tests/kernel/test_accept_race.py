"""Who accepted is written down before accept() returns, wherever the client runs meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import ping_server
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.stage import Stage
from harness.users import ALICE

pytestmark = pytest.mark.kernel

CONNECTIONS = 500


@pytest.mark.parametrize(
    ("how", "client_is_elsewhere"), [("waits", False), ("waits", True), ("spins", True)]
)
def test_a_server_that_is_in_accept_and_asks_at_once_knows_who_accepted(
    stage: Stage, daemon: Daemon, cgroup: Cgroup, how: str, client_is_elsewhere: bool
) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    servers, clients = cpus[0], cpus[-1 if client_is_elsewhere else 0]
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "harness.ping_server"),
            *(daemon.address, str(CONNECTIONS), str(servers), how),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(ping_server.__file__).parent.parent,
    ) as server:
        assert server.stdin
        assert server.stdout
        try:
            cgroup.add(server.pid)
            server.stdin.write("begin\n")
            server.stdin.flush()
            target = ("127.0.0.1", int(server.stdout.readline()))
            client = stage.actor(ALICE)
            client(ping_server.connect_again_and_again, target, CONNECTIONS, clients)
            wrong, _ = server.communicate()
        finally:
            server.kill()
    assert json.loads(wrong) == []
