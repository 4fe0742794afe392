"""Many short-lived connections of many short-lived processes, every answer checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

import peercred
from harness import churn, patience, steps
from harness.cgroup import Cgroup
from harness.channel import Descriptor
from harness.daemon import Daemon, drops
from harness.stage import Stage
from harness.users import ALICE, BOB, CAROL, DAVE

pytestmark = pytest.mark.kernel

SERVERS = 2
CLIENTS_PER_SERVER = 2
PROCESSES_PER_CLIENT = 200 if patience.FACTOR == 1 else 100
CONNECTIONS_PER_PROCESS = 252
UIDS = [ALICE, BOB, CAROL, DAVE, DAVE + 1]


class Server:
    """A `churn` process, in the cgroup."""

    def __init__(self, daemon: Daemon, cgroup: Cgroup, harness: Path) -> None:
        self.credits, giving = os.pipe()
        with open(giving, "wb", buffering=0):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.churn", daemon.address, str(giving)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=harness.parent,
                pass_fds=[giving],
            )
        # Sockets belong to the cgroup that they are made in, so move first.
        cgroup.add(self.process.pid)
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("begin\n")
        self.process.stdin.flush()
        self.ports: list[int] = json.loads(self.process.stdout.readline())

    def report(self) -> tuple[Counter[int], list[str]]:
        """What the server has seen, after it has emptied its queues."""
        output, _ = self.process.communicate()
        report = json.loads(output)
        return Counter({int(uid): count for uid, count in report["right"].items()}), report["wrong"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.credits)


@pytest.mark.timeout(1200)
def test_of_100_000_and_more_short_lived_connections_none_is_wrong_and_none_is_missing(
    stage: Stage, daemon: Daemon, cgroup: Cgroup, client: peercred.Client
) -> None:
    dropped = drops(client)
    with ExitStack() as exit_stack:
        calls = []
        servers = []
        for _ in range(SERVERS):
            server = Server(daemon, cgroup, Path(churn.__file__).parent)
            exit_stack.callback(server.close)
            servers.append(server)
            for _ in range(CLIENTS_PER_SERVER):
                actor = stage.actor()
                (taking,) = actor(steps.take, [Descriptor(server.credits)])
                calls.append(
                    actor.start(
                        churn.connect_from_many_processes,
                        server.ports,
                        taking,
                        UIDS,
                        PROCESSES_PER_CLIENT,
                        CONNECTIONS_PER_PROCESS,
                    )
                )
        made = sum((call.result(churn.SERVE_SECONDS) for call in calls), Counter())
        right: Counter[int] = Counter()
        wrong: list[str] = []
        for server in servers:
            server_right, server_wrong = server.report()
            right += server_right
            wrong += server_wrong
    assert wrong == []
    assert right == made
    assert made.total() >= (200_000 if patience.FACTOR == 1 else 100_000)
    assert set(made) == set(UIDS)
    stage.wait_until_empty()
    assert drops(client) == dropped
