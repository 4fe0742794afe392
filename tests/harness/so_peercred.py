"""What the kernel tells a socket's holder of its peer. Standard library only: actors ask too."""

from __future__ import annotations

import array
import ctypes
import errno
import socket
import struct
from typing import NamedTuple

SO_PEERGROUPS = 59
MAX_GROUPS = 32
UCRED_SIZE = 12
_UCRED = struct.Struct("iII")
_libc = ctypes.CDLL(None, use_errno=True)
_LARGEST_OPTION = 1024


class Credentials(NamedTuple):
    """``struct ucred``."""

    pid: int
    uid: int
    gid: int


class Peer(NamedTuple):
    """What SO_PEERCRED and SO_PEERGROUPS say."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]
    """The first MAX_GROUPS."""
    group_count: int


NOBODY = Credentials(0, -1 & 0xFFFFFFFF, -1 & 0xFFFFFFFF)
"""What the kernel says of a socket whose peer it does not know."""


class Told(NamedTuple):
    """All that a getsockopt() did."""

    errno: int
    """0 if it succeeded."""
    length: int
    """What it left where the length was given."""
    buffer: bytes
    """The whole of it, with what it did not write."""


def getsockopt(sock: socket.socket, level: int, option: int, length: int, room: int = -1) -> Told:
    """Call it as C does, with a buffer of `room` bytes (as many as `length` says, unless told).

    With room 0 the buffer is NULL.
    """
    room = max(length, 0) if room < 0 else room
    buffer = ctypes.create_string_buffer(b"\xa5" * room, room) if room else None
    left = ctypes.c_int(length)
    failed = _libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(left))
    return Told(ctypes.get_errno() if failed else 0, left.value, buffer.raw if buffer else b"")


def credentials(sock: socket.socket) -> Credentials:
    """Ask with SO_PEERCRED, in the numbers of the namespaces this process is in."""
    option = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Credentials._make(_UCRED.unpack(option))


def groups(sock: socket.socket) -> tuple[int, ...]:
    """Ask with SO_PEERGROUPS; raises OSError where that has no answer."""
    given = array.array("I")
    given.frombytes(sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _LARGEST_OPTION))
    return tuple(given)


def peer(sock: socket.socket) -> Peer:
    """Ask who is at the other end of a unix(7) socket."""
    supplementary = groups(sock)
    return Peer(*credentials(sock), supplementary[:MAX_GROUPS], len(supplementary))


def tcp_peer(sock: socket.socket) -> tuple[Credentials, tuple[int, ...] | None]:
    """Ask the same of a TCP socket; its groups are None where there are none to give.

    Often enough to be told what a client's socket keeps, which it does from the second time on.
    """
    try:
        supplementary = groups(sock)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        supplementary = None
    told = [credentials(sock) for _ in range(4)]
    assert told == [told[0]] * len(told)
    return told[0], supplementary


def as_told_by_tcp(expected: Peer) -> tuple[Credentials, tuple[int, ...] | None]:
    """What a TCP socket has to say: no groups as well as too many of them are not given."""
    given = expected.groups if 0 < expected.group_count <= MAX_GROUPS else None
    return Credentials(expected.pid, expected.uid, expected.gid), given
