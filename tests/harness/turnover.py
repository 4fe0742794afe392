"""Connections that come and go while something lasts. Standard library only: see `steps`."""

from __future__ import annotations

import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness import so_peercred, steps
from harness.so_peercred import Credentials

_NOT_THE_LAST, _THE_LAST = b".", b"!"


def connect_until(ended: str, target: Any, pause_seconds: float) -> int:
    """Connect again and again, with pauses, until there is such a file; returns how often."""
    count, last = 0, False
    while not last:
        last = Path(ended).exists()
        with socket.create_connection(target) as client:
            client.sendall(_THE_LAST if last else _NOT_THE_LAST)
            client.recv(1)
        count += 1
        time.sleep(pause_seconds)
    return count


def ask_until_the_last(listener: int) -> Counter[Credentials]:
    """Accept these connections, and count what SO_PEERCRED tells of them."""
    told: Counter[Credentials] = Counter()
    last = False
    while not last:
        with socket.socket(fileno=steps.accept_one(listener)) as accepted:
            told[so_peercred.credentials(accepted)] += 1
            last = accepted.recv(1) == _THE_LAST
    return told
