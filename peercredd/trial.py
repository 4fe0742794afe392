"""A connection of the loader's own, to see that the traced functions are those it passes through.

BTF tells that a function is there. Where the compiler has also inlined it into one of
its callers, a program at it attaches, and misses what goes that way.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress

from peercredd.hooks import Program, Traced
from peercredd.libbpf import KernelError, counting_runs, run_count

_TIMEOUT_SECONDS = 5.0
_RESET = struct.pack("ii", 1, 0)  # struct linger: nothing lingers on, TIME_WAIT included


def run(programs: Mapping[Program | Traced, int]) -> None:
    """Connect over loopback and see which of the attached tracing programs ran.

    What cannot be tried is taken for good: this network namespace may have no IPv6, or
    no loopback that is up.

    Raises:
        KernelError: a program did not run. The text names the function.
    """
    traced = {
        each.name: fd
        for each, fd in programs.items()
        if isinstance(each, Traced) and each.on_every_path
    }
    if not traced:
        return
    expected = set()
    with counting_runs():
        before = {name: run_count(program) for name, program in traced.items()}
        for family, address, other in (
            (socket.AF_INET, "127.0.0.1", "tcp_v6_connect"),
            (socket.AF_INET6, "::1", "tcp_v4_connect"),
        ):
            with suppress(OSError):
                _connect(family, address)
                expected |= traced.keys() - {other}
    silent = [
        name for name in traced if name in expected and run_count(traced[name]) == before[name]
    ]
    if silent:
        raise KernelError(
            errno.ENOSYS,
            f"a connection did not pass through {', '.join(silent)}: this kernel has inlined it",
        )


def _connect(family: socket.AddressFamily, address: str) -> None:
    """Make a connection, accept it and reset it."""
    with socket.socket(family) as listener, socket.socket(family) as client:
        listener.settimeout(_TIMEOUT_SECONDS)
        client.settimeout(_TIMEOUT_SECONDS)
        listener.bind((address, 0))
        listener.listen()
        client.connect(listener.getsockname())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        with listener.accept()[0]:
            client.close()
