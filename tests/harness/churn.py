"""Short-lived connections by the hundred thousand, and a server that checks each answer.

A client's first bytes say who it is; no other truth is needed. Clients are actors. A
server is a process of its own, because it has to have the client library:
``python churn.py ADDRESS CREDITS`` reads a line (it may begin), prints the ports it
listens on, and when its standard input ends prints what it has seen, as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import struct
import sys
from collections import Counter
from typing import Any

from harness import steps
from harness.acceptors import acceptor_of, told_acceptor
from harness.patience import patient
from harness.routes import MAPPED, V4, V6

HELLO = struct.Struct("=II")
"""The pid and the effective uid of a client."""
ROUTES = (V4, V6, MAPPED)
BACKLOG = 4096
CREDITS = 3000
"""Connections that may be in a server's queues at once: fewer than its backlog."""
BATCH = 250
SERVE_SECONDS = patient(600)


def connect_from_many_processes(
    ports: list[int], credits_fd: int, uids: list[int], processes: int, connections: int
) -> Counter[int]:
    """Fork one process after another, each with a uid; returns the connections of each uid."""
    made: Counter[int] = Counter()
    for uid in itertools.islice(itertools.cycle(uids), processes):
        pid = os.fork()
        if not pid:
            try:
                steps.become(uid)
                _connect_many(ports, credits_fd, connections)
                os._exit(0)
            finally:
                os._exit(1)
        if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise ChildProcessError(f"a client of uid {uid} ended with {status}")
        made[uid] += connections
    return made


def _connect_many(ports: list[int], credits_fd: int, connections: int) -> None:
    hello = HELLO.pack(os.getpid(), os.geteuid())
    targets = [
        (route.client_family, (route.target, port))
        for route, port in zip(ROUTES, ports, strict=True)
    ]
    for number in range(connections):
        # A queue that overflows would make the kernel drop SYNs, and cost seconds.
        os.read(credits_fd, 1)
        family, target = targets[number % len(targets)]
        sock = socket.socket(family)
        sock.connect(target)
        sock.sendall(hello)
        if number % 4 == 3:
            # Leaves no TIME_WAIT, so that this very tuple is soon used again.
            steps.reset_delivered(sock.detach())
        else:
            sock.close()


class Server:
    """Accepts, reads who it was, asks the daemon, compares."""

    def __init__(self, address: str, credits_fd: int) -> None:
        import peercred

        self._client = peercred.Client(address, timeout=patient(60))
        hook_set = self._client.status().hook_set
        self._acceptor = told_acceptor(hook_set, os.getpid(), os.geteuid())
        self._credits_fd = credits_fd
        self._listeners = []
        for route in ROUTES:
            fds = steps.bind(route)
            steps.listen(fds, BACKLOG)
            os.close(fds.unix)
            listener = socket.socket(fileno=fds.tcp)
            listener.setblocking(False)
            self._listeners.append(listener)
        self.ports = [listener.getsockname()[1] for listener in self._listeners]
        self.right: Counter[int] = Counter()
        self.wrong: list[str] = []

    def serve(self, end: int) -> None:
        """Answer until `end` can be read and no connection is left."""
        os.write(self._credits_fd, bytes(CREDITS))
        poll = select.poll()
        for listener in self._listeners:
            poll.register(listener, select.POLLIN)
        poll.register(end, select.POLLIN)
        ended = False
        while True:
            ended = ended or any(fd == end for fd, _ in poll.poll())
            accepted = [sock for listener in self._listeners for sock in self._accept(listener)]
            if accepted:
                self._check(accepted)
                os.write(self._credits_fd, bytes(len(accepted)))
            elif ended:
                return

    def _accept(self, listener: socket.socket) -> list[socket.socket]:
        accepted: list[socket.socket] = []
        try:
            while len(accepted) < BATCH:
                accepted.append(listener.accept()[0])
        except BlockingIOError:
            pass
        return accepted

    def _check(self, accepted: list[socket.socket]) -> None:
        hellos = []
        for sock in accepted:
            sock.setblocking(True)
            hellos.append(sock.recv(HELLO.size, socket.MSG_WAITALL))
        for hello, answer in zip(hellos, self._client.lookup_many(accepted), strict=True):
            pid, uid = HELLO.unpack(hello)
            found: Any = answer
            if isinstance(answer, Exception):
                self.wrong.append(f"pid {pid} uid {uid}: {type(answer).__name__}: {answer}")
            elif (found.pid, found.uid, found.gid, found.real_uid) != (pid, uid, uid, uid):
                self.wrong.append(f"pid {pid} uid {uid}: {answer}")
            elif acceptor_of(found) != self._acceptor:
                self.wrong.append(f"accepted by {self._acceptor}: {answer}")
            else:
                self.right[uid] += 1
        for sock in accepted:
            sock.close()


def main() -> None:
    """Serve as the command line says."""
    sys.stdin.readline()
    server = Server(sys.argv[1], int(sys.argv[2]))
    print(json.dumps(server.ports), flush=True)
    server.serve(sys.stdin.fileno())
    print(json.dumps({"right": server.right, "wrong": server.wrong[:20]}), flush=True)


if __name__ == "__main__":
    main()
