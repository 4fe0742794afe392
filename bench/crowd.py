"""Open sockets: loopback connections held by processes and users of their own."""

from __future__ import annotations

import os
import resource
import socket
import sys
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import NamedTuple, Self

from bench.child import Child, answer

FIRST_UID = 20_000
CONNECTIONS_PER_HOLDER = 2_500
SAMPLES_PER_HOLDER = 100

# asm-generic/socket.h; Python's socket module has neither.
SO_COOKIE = 57
SO_NETNS_COOKIE = 71

Address = tuple[str, int]


class Question(NamedTuple):
    """What the accepting end of a connection knows of it, and the right answer."""

    local: Address
    remote: Address
    cookie: int
    netns_cookie: int
    uid: int
    pid: int


class Crowd:
    """A growing number of open sockets, made in the cgroup `cgroup`; a context manager.

    `questions` are up to 100 of each holder's connections.
    """

    def __init__(self, cgroup: Path) -> None:
        self.sockets = 0
        self.questions: list[Question] = []
        self._cgroup = cgroup
        self._holders = ExitStack()
        self._addresses = (f"127.0.1.{number}" for number in count(1))
        self._uids = count(FIRST_UID)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._holders.close()

    def grow(self, sockets: int) -> None:
        """Open more connections, two sockets each, until there are `sockets`."""
        while self.sockets < sockets:
            connections = min((sockets - self.sockets) // 2, CONNECTIONS_PER_HOLDER)
            holder = Child(
                "bench.crowd", self._cgroup, next(self._addresses), next(self._uids), connections
            )
            self._holders.enter_context(holder)
            for local, remote, *rest in holder.hear():
                self.questions.append(Question(tuple(local), tuple(remote), *rest))
            self.sockets += 2 * connections


def question(accepted: socket.socket, uid: int, pid: int) -> Question:
    return Question(
        accepted.getsockname(),
        accepted.getpeername(),
        cookie(accepted),
        cookie(accepted, SO_NETNS_COOKIE),
        uid,
        pid,
    )


def cookie(sock: socket.socket, option: int = SO_COOKIE) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, option, 8), sys.byteorder)


def _hold(cgroup: Path, address: str, uid: int, connections: int) -> None:
    """Be a holder: say the questions on stdout, keep the sockets until stdin ends."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * connections + 64, 2 * connections + 64))
    (cgroup / "cgroup.procs").write_text("0")
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    listener = socket.create_server((address, 0))
    held = []
    for _ in range(connections):
        client = socket.create_connection(listener.getsockname())
        held.append((client, listener.accept()[0]))
    step = max(1, connections // SAMPLES_PER_HOLDER)
    samples = [question(accepted, uid, os.getpid()) for _, accepted in held[::step]]
    answer(samples[:SAMPLES_PER_HOLDER])
    sys.stdin.read()


if __name__ == "__main__":
    _hold(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
