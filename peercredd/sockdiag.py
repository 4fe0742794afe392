"""Which TCP sockets are alive now: sock_diag(7).

pyroute2 writes the question and knows the numbers. Its own reader of the answers is
not used: it takes 80 µs for a socket where this takes 2, and it passes over the
kernel's errors, so that "cannot tell" would read as "no socket is alive".
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from peercredd.records import V4_MAPPED

_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""
_ANSWER = struct.Struct("=Bxxx2H16s16s4x2I")
"""struct inet_diag_msg: family, ports, addresses, cookie (low half, high half)."""
_STATUS = struct.Struct("=i")
"""How NLMSG_DONE and NLMSG_ERROR begin: 0 or a negative errno."""
_LARGEST_MESSAGE = 1 << 16  # the kernel fills at most 32 KiB (netlink_recvmsg())


class Socket(NamedTuple):
    """A TCP socket as sock_diag lists it."""

    cookie: int
    """SO_COOKIE; the kernel gives the socket one now if it had none."""
    local_address: bytes
    """16 bytes; IPv4 as v4-mapped IPv6."""
    remote_address: bytes
    local_port: int
    """Host byte order."""
    remote_port: int


def sockets() -> Iterator[Socket]:
    """List the TCP sockets of the calling thread's network namespace that have a peer.

    A multipath socket is listed by its subflows. Not listed is a socket in state CLOSE,
    though a descriptor of it may be open. While others come and go, a socket that is
    there throughout can be missed: inet_diag_dump_icsk() resumes by its number in a
    hash chain. Only one that is missed twice is gone.

    Raises:
        OSError: the kernel does not tell.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        yield from _dump(family, socket.IPPROTO_TCP)


def _dump(family: int, protocol: int) -> Iterator[Socket]:
    # Here, so that a process that asks has called `lean.leave_out` before.
    from pyroute2 import netlink
    from pyroute2.netlink import diag

    # LISTEN has no peer, a TIME_WAIT row bears the cookie of a socket that is closed, and
    # what is in CLOSE is in none of the kernel's tables.
    left_out = 1 << diag.SS_LISTEN | 1 << diag.SS_TIME_WAIT | 1 << diag.SS_CLOSE
    request = diag.inet_diag_req()
    request["header"]["type"] = diag.SOCK_DIAG_BY_FAMILY
    request["header"]["flags"] = netlink.NLM_F_REQUEST | netlink.NLM_F_DUMP
    request["sdiag_family"] = family
    request["sdiag_protocol"] = protocol
    request["idiag_states"] = diag.SS_ALL & ~left_out
    request.encode()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, netlink.NETLINK_SOCK_DIAG) as channel:
        channel.send(request.data)
        while True:
            data = channel.recv(_LARGEST_MESSAGE)
            offset = 0
            while offset < len(data):
                length, kind, *_ = _HEADER.unpack_from(data, offset)
                start = offset + _HEADER.size
                if kind in (netlink.NLMSG_DONE, netlink.NLMSG_ERROR):
                    _check(*_STATUS.unpack_from(data, start))
                    return
                yield _decode(data, start)
                offset += length + -length % 4


def _decode(data: bytes, start: int) -> Socket:
    family, local_port, remote_port, local, remote, low, high = _ANSWER.unpack_from(data, start)
    if family == socket.AF_INET:
        local, remote = V4_MAPPED + local[:4], V4_MAPPED + remote[:4]
    return Socket(
        low | high << 32, local, remote, socket.ntohs(local_port), socket.ntohs(remote_port)
    )


def _check(status: int) -> None:
    if status < 0:
        mend = "; load the kernel module tcp_diag" if -status == errno.ENOENT else ""
        reason = f"sock_diag does not list the TCP sockets: {os.strerror(-status)}{mend}"
        raise OSError(-status, reason)
