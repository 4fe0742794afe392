"""Clients that connect, close and exit before anybody asks who they were."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from bench.child import Child, answer, orders
from bench.crowd import Address


class Clients(Child):
    """Makes clients in one cgroup, from a process that may fork: it has no gRPC threads."""

    def __init__(self, cgroup: Path) -> None:
        super().__init__("bench.gone", cgroup)

    def connect_and_exit(self, server: Address, uid: int) -> int:
        """Have a process of `uid` connect to `server`, close and exit; return its pid."""
        self.tell((server, uid))
        return int(self.hear())


def _make(cgroup: Path) -> None:
    (cgroup / "cgroup.procs").write_text("0")
    for server, uid in orders():
        client = os.fork()
        if client == 0:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            socket.create_connection(server).close()
            os._exit(0)
        os.waitpid(client, 0)
        answer(client)


if __name__ == "__main__":
    _make(Path(sys.argv[1]))
