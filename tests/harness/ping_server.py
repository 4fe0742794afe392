"""A server that is in accept() when a client comes, and asks at once who accepted.

``python ping_server.py ADDRESS CONNECTIONS CPU HOW`` waits there, or with HOW "spins" calls
it again and again, which may meet a connection whose client is not through yet. It reads
a line (it may begin), prints the port it listens on, and in the end what was wrong, as
JSON. It greets each client after it has asked; clients are actors.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from typing import Any

from harness.acceptors import acceptor_of, told_acceptor
from harness.patience import CALL_SECONDS


def connect_again_and_again(target: Any, connections: int, cpu: int) -> None:
    """Connect when the server is in accept() again."""
    os.sched_setaffinity(0, {cpu})
    for _ in range(connections):
        with socket.create_connection(target) as sock:
            sock.recv(1)


def serve(address: str, connections: int, cpu: int, how: str) -> list[str]:
    """Returns what was answered wrong."""
    import peercred

    os.sched_setaffinity(0, {cpu})
    wrong = []
    with (
        peercred.Client(address, timeout=CALL_SECONDS) as client,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        print(listener.getsockname()[1], flush=True)
        expected = told_acceptor(client.status().hook_set, os.getpid(), os.geteuid())
        for _ in range(connections):
            with accept(listener, how) as sock:
                acceptor = acceptor_of(client.lookup(sock))
                if acceptor != expected:
                    wrong.append(f"{acceptor}, not {expected}")
                sock.sendall(b"x")
    return wrong


def accept(listener: socket.socket, how: str) -> socket.socket:
    """Accept one connection; in the way that the command line names."""
    listener.setblocking(how == "waits")
    while True:
        with contextlib.suppress(BlockingIOError):
            accepted = listener.accept()[0]
            accepted.setblocking(True)
            return accepted


def main() -> None:
    """Serve as the command line says."""
    sys.stdin.readline()
    print(json.dumps(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))


if __name__ == "__main__":
    main()
