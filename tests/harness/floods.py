"""What an actor does to take all the room there is. Standard library only: see `steps`."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Any

from harness import steps
from harness.steps import Route


def connect(target: Any, count: int) -> list[int]:
    """That many connections."""
    return [_connected(target) for _ in range(count)]


def connect_as_many(target: Any, uids: Iterable[int], count: int) -> list[int]:
    """Connect that often as each of these users."""
    fds = []
    os.setresuid(0, 0, 0)
    for uid in uids:
        os.setresuid(uid, uid, 0)
        fds += connect(target, count)
        os.setresuid(0, 0, 0)
    return fds


def connect_and_close(target: Any, count: int) -> None:
    """That many connections, each closed at once; the server still has its end."""
    for _ in range(count):
        os.close(_connected(target))


def connect_and_reset(target: Any, count: int) -> None:
    """That many connections, each reset before the server could accept it."""
    for _ in range(count):
        steps.reset_delivered(_connected(target))


def start_connecting(target: Any, count: int) -> list[int]:
    """That many SYNs, whatever becomes of them."""
    fds = [socket.socket().detach() for _ in range(count)]
    for fd in fds:
        steps.start_connect(fd, target)
    return fds


def listen(route: Route, count: int, backlog: int) -> tuple[list[int], list[Any]]:
    """That many listeners, and where to connect to each."""
    listeners, targets = [], []
    for _ in range(count):
        with socket.socket(route.server_family) as sock:
            sock.bind((route.bound, 0))
            sock.listen(backlog)
            targets.append((route.target, sock.getsockname()[1]))
            listeners.append(sock.detach())
    return listeners, targets


def accept(listener: int, count: int) -> list[int]:
    """Accept that many."""
    return [steps.accept_one(listener) for _ in range(count)]


def _connected(target: Any) -> int:
    sock = socket.socket()
    sock.connect(target)
    return sock.detach()
