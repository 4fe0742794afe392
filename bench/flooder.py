"""A user who takes what it may have of the tables, and goes on connecting."""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from collections.abc import Callable

from bench.child import Child, answer, orders
from bench.modest import RESET

SPARE_DESCRIPTORS = 64


class Flooder(Child):
    """The process. It holds `connections` open from its start."""

    def __init__(self, uid: int, connections: int) -> None:
        super().__init__("bench.flooder", uid, connections)
        self.hear()

    def start(self, what: str, seconds: float) -> None:
        """Begin to connect ("flood"), or to do nothing that takes as much of a CPU ("spin")."""
        self.tell((what, seconds))

    def finish(self) -> float:
        """Wait for the end of it; returns how many times a second it did it."""
        return float(self.hear())


def _flood(uid: int, connections: int) -> None:
    files = 2 * connections + SPARE_DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    with socket.create_server(("127.0.2.1", 0)) as listener:
        held = [_connection(listener) for _ in range(connections)]
        answer(len(held))
        work: dict[str, Callable[[], object]] = {
            "flood": lambda: _connect_and_reset(listener),
            "spin": lambda: None,
        }
        for what, seconds in orders():
            answer(_repeated(work[what], seconds))


def _repeated(work: Callable[[], object], seconds: float) -> float:
    times = 0
    begin = now = time.perf_counter()
    while now < begin + seconds:
        work()
        times += 1
        now = time.perf_counter()
    return times / (now - begin)


def _connection(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = socket.create_connection(listener.getsockname())
    return client, listener.accept()[0]


def _connect_and_reset(listener: socket.socket) -> None:
    client, accepted = _connection(listener)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    accepted.close()


if __name__ == "__main__":
    _flood(int(sys.argv[1]), int(sys.argv[2]))
