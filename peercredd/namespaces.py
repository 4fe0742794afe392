"""Network namespaces: which can be reached, and a visit to one.

setns(2) moves the calling thread alone, so visits are for short-lived processes
that have one.
"""

from __future__ import annotations

import errno
import glob
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from peercredd.libbpf import KernelError

_SO_NETNS_COOKIE = 71  # asm-generic/socket.h; not in the socket module


def reachable() -> Iterator[int]:
    """File descriptors of the network namespaces that can be reached, each once.

    They are those of running threads, and those bind-mounted where this process
    sees them, as ``ip netns`` does. One that nothing but a socket or somebody's
    descriptor keeps alive is not among them.

    A descriptor is closed when the next one is asked for.
    """
    device = Path("/proc/self/ns/net").stat().st_dev
    seen = set()
    # Path.glob() raises when a process ends in the middle of it.
    of_threads = glob.iglob("/proc/[0-9]*/task/[0-9]*/ns/net")  # noqa: PTH207
    for path in chain(map(Path, of_threads), _mounted()):
        try:
            status = path.stat()
            # Another file system may be mounted over a namespace's place.
            if status.st_dev != device or status.st_ino in seen:
                continue
            namespace = os.open(path, os.O_RDONLY)
        except OSError:  # the thread has ended, or is not ours to look at
            continue
        try:
            seen.add(os.fstat(namespace).st_ino)
            yield namespace
        finally:
            os.close(namespace)


@contextmanager
def entered(namespace: int) -> Iterator[int]:
    """Be in a network namespace for a while; gives its cookie (``SO_NETNS_COOKIE``).

    Sockets made meanwhile belong to it for good. The calling thread is back in
    its own namespace afterwards, whatever happens.

    Args:
        namespace: a file descriptor of the namespace.

    Raises:
        OSError: the namespace may not be entered (that takes CAP_SYS_ADMIN).
    """
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _enter(namespace)
        try:
            yield own_cookie()
        finally:
            _enter(own)
    finally:
        os.close(own)


def _enter(namespace: int) -> None:
    # Here, for the server imports this module too and never enters a namespace.
    from pyroute2 import netns

    try:
        netns.setns(namespace)  # os.setns() came with Python 3.12
    except OSError as error:
        reason = f"a network namespace cannot be entered: {error.strerror}; run as root"
        raise OSError(error.errno, reason) from error


def own_cookie() -> int:
    """Cookie of the network namespace that the calling thread is in.

    Raises:
        KernelError: the kernel is older than 5.14 and has none.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as anchor:
        try:
            cookie = anchor.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError as error:
            raise KernelError(
                error.errno or errno.ENOPROTOOPT,
                "this kernel gives network namespaces no cookie; Linux 5.14 or newer is needed",
            ) from error
    return int.from_bytes(cookie, sys.byteorder)


def _mounted() -> Iterator[Path]:
    """Where network namespaces are bind-mounted: mountinfo of proc_pid_mountinfo(5)."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        mount, _, source = line.partition(b" - ")
        root, path = mount.split(b" ")[3:5]
        if source.startswith(b"nsfs ") and root.startswith(b"net:"):
            yield Path(os.fsdecode(path.decode("unicode_escape").encode("latin-1")))
