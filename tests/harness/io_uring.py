"""connect() and accept() through io_uring, in each of the ways that make another task do it."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from enum import Enum

from harness.syscalls import syscall

_OP_ACCEPT = 13
_OP_CONNECT = 16
_OP_SEND = 26
_SQE_ASYNC = 1 << 4
_SETUP_SQPOLL = 1 << 1
_ENTER_GETEVENTS = 1 << 0
_ENTER_SQ_WAKEUP = 1 << 1
_REGISTER_PERSONALITY = 9
_OFF_SQ_RING = 0
_OFF_SQES = 0x10000000
_ENTRIES = 4
_CQE = struct.Struct("=QiI")


class Mode(Enum):
    """Which task ends up in the kernel's connect() or accept()."""

    INLINE = "the task that submits"
    WORKER = "a worker thread of the kernel's, on behalf of the task"
    POLLED = "the ring's own polling thread"


class _Parameters(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("sq_entries", "cq_entries", "flags")),
        *((name, ctypes.c_uint32) for name in ("sq_thread_cpu", "sq_thread_idle", "features")),
        ("wq_fd", ctypes.c_uint32),
        ("resv", ctypes.c_uint32 * 3),
        *((f"sq_{name}", ctypes.c_uint32) for name in ("head", "tail", "ring_mask")),
        *((f"sq_{name}", ctypes.c_uint32) for name in ("ring_entries", "flags_at", "dropped")),
        ("sq_array", ctypes.c_uint32),
        ("sq_resv", ctypes.c_uint32),
        ("sq_user_addr", ctypes.c_uint64),
        *((f"cq_{name}", ctypes.c_uint32) for name in ("head", "tail", "ring_mask")),
        *((f"cq_{name}", ctypes.c_uint32) for name in ("ring_entries", "overflow", "cqes")),
        *((f"cq_{name}", ctypes.c_uint32) for name in ("flags_at", "resv")),
        ("cq_user_addr", ctypes.c_uint64),
    )


class Ring:
    """A ring for one call at a time."""

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        parameters = _Parameters(
            flags=_SETUP_SQPOLL if mode is Mode.POLLED else 0, sq_thread_idle=1000
        )
        self._fd = syscall("io_uring_setup", _ENTRIES, ctypes.byref(parameters))
        self._at = parameters
        length = max(
            parameters.sq_array + parameters.sq_entries * 4,
            parameters.cq_cqes + parameters.cq_entries * _CQE.size,
        )
        self._ring = mmap.mmap(self._fd, length, mmap.MAP_SHARED, offset=_OFF_SQ_RING)
        self._entries = mmap.mmap(
            self._fd, parameters.sq_entries * 64, mmap.MAP_SHARED, offset=_OFF_SQES
        )

    def register_credentials(self) -> int:
        """Keep the calling task's present credentials; returns their number, a `personality`."""
        return syscall("io_uring_register", self._fd, _REGISTER_PERSONALITY, None, 0)

    def connect(self, fd: int, address: bytes, personality: int = 0) -> None:
        """Connect `fd` to a raw sockaddr; raises OSError."""
        buffer = ctypes.create_string_buffer(address, len(address))
        at = ctypes.addressof(buffer)
        self._call(_OP_CONNECT, fd, at, personality, offset=len(address))

    def accept(self, fd: int, personality: int = 0) -> int:
        """Accept a connection, blocking; returns its descriptor, raises OSError."""
        return self._call(_OP_ACCEPT, fd, 0, personality)

    def send(self, fd: int, data: bytes, personality: int = 0) -> int:
        """Send on `fd`; returns how many bytes, raises OSError."""
        buffer = ctypes.create_string_buffer(data, len(data))
        at = ctypes.addressof(buffer)
        return self._call(_OP_SEND, fd, at, personality, length=len(data))

    def close(self) -> None:
        """Give the ring back; the kernel may finish doing so later."""
        self._ring.close()
        self._entries.close()
        os.close(self._fd)

    def _call(
        self,
        operation: int,
        fd: int,
        address: int,
        personality: int,
        *,
        offset: int = 0,
        length: int = 0,
    ) -> int:
        struct.pack_into(
            "=BBHiQQIIQHHI16x",
            self._entries,
            0,
            operation,
            _SQE_ASYNC if self._mode is Mode.WORKER else 0,
            0,
            fd,
            offset,
            address,
            length,
            0,
            1,
            0,
            personality,
            0,
        )
        self._store(self._at.sq_array, 0)
        self._store(self._at.sq_tail, self._load(self._at.sq_tail) + 1)
        flags = _ENTER_GETEVENTS | (_ENTER_SQ_WAKEUP if self._mode is Mode.POLLED else 0)
        syscall("io_uring_enter", self._fd, 1, 1, flags, None, 0)
        head = self._load(self._at.cq_head)
        at = self._at.cq_cqes + (head & self._load(self._at.cq_ring_mask)) * _CQE.size
        result: int = _CQE.unpack_from(self._ring, at)[1]
        self._store(self._at.cq_head, head + 1)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def _load(self, offset: int) -> int:
        value: int = struct.unpack_from("=I", self._ring, offset)[0]
        return value

    def _store(self, offset: int, value: int) -> None:
        struct.pack_into("=I", self._ring, offset, value)


def sockaddr(family: int, address: tuple[str, int] | bytes) -> bytes:
    """The C struct for an address in Python's form."""
    if isinstance(address, bytes):
        return struct.pack("=H", socket.AF_UNIX) + address
    host, port = address[:2]
    packed = socket.inet_pton(family, host)
    if family == socket.AF_INET:
        return struct.pack("=H", family) + struct.pack("!H4s8x", port, packed)
    return struct.pack("=H", family) + struct.pack("!HI16sI", port, 0, packed, 0)
