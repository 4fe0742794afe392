"""Python objects over a SOCK_SEQPACKET socket, and file descriptors inside them."""

from __future__ import annotations

import array
import io
import pickle
import socket
from typing import Any

_MAX_MESSAGE = 1 << 17
_MAX_DESCRIPTORS = 64


class Descriptor(int):
    """A file descriptor that is duplicated into the receiving process."""


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.descriptors: list[int] = []

    def persistent_id(self, obj: object) -> int | None:
        if not isinstance(obj, Descriptor):
            return None
        self.descriptors.append(int(obj))
        return len(self.descriptors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, descriptors: list[int]) -> None:
        super().__init__(file)
        self.descriptors = descriptors

    def persistent_load(self, pid: int) -> Descriptor:
        return Descriptor(self.descriptors[pid])


def send(sock: socket.socket, message: object) -> None:
    """Send one message; the sender keeps its own descriptors."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(message)
    rights = array.array("i", pickler.descriptors)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    sock.sendmsg([buffer.getvalue()], ancillary)


def receive(sock: socket.socket) -> Any:
    """Receive one message; raises EOFError when the other side is gone."""
    rights = array.array("i")
    data, ancillary, flags, _ = sock.recvmsg(
        _MAX_MESSAGE,
        socket.CMSG_SPACE(_MAX_DESCRIPTORS * rights.itemsize),
        socket.MSG_CMSG_CLOEXEC,
    )
    if not data:
        raise EOFError("the other side is gone")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise ValueError("the message does not fit")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            rights.frombytes(content[: len(content) - len(content) % rights.itemsize])
    return _Unpickler(io.BytesIO(data), list(rights)).load()
