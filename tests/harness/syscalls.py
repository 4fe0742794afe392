"""System calls that Python has no function for, or only one that does too much.

glibc's setresuid() changes every thread of the process, and Python's goes through
it; the system call changes the calling thread alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from pathlib import Path

CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_NUMBERS = {
    "x86_64": {
        "setresuid": 117,
        "setresgid": 119,
        "setgroups": 116,
        "exit": 60,
        "accept4": 288,
        "unshare": 272,
        "setns": 308,
    },
    "aarch64": {
        "setresuid": 147,
        "setresgid": 149,
        "setgroups": 159,
        "exit": 93,
        "accept4": 242,
        "unshare": 97,
        "setns": 268,
    },
}[platform.machine()] | {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "clone3": 435,
}

_libc = ctypes.CDLL(None, use_errno=True)
_held_libc = ctypes.PyDLL(None, use_errno=True)


def syscall(name: str, *arguments: object) -> int:
    """Make one system call, for the calling thread alone; raises OSError."""
    converted = [
        ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments
    ]
    result: int = _libc.syscall(ctypes.c_long(_NUMBERS[name]), *converted)
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")
    return result


def fork_with_pid(pid: int) -> int:
    """fork() a child that has this number, which has to be free; returns what fork() does.

    For a process with one thread. Raises OSError.
    """
    number = ctypes.c_int32(pid)
    # struct clone_args of include/uapi/linux/sched.h; each field has 64 bits.
    arguments = (ctypes.c_uint64 * 11)()
    arguments[4] = signal.SIGCHLD
    arguments[8], arguments[9] = ctypes.addressof(number), 1
    # As long as the interpreter is held, no other thread is in the middle of anything.
    made: int = _held_libc.syscall(
        ctypes.c_long(_NUMBERS["clone3"]), arguments, ctypes.c_long(ctypes.sizeof(arguments))
    )
    if made < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"clone3: {os.strerror(errno)}")
    if not made:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    return made


def is_in(name: str, pid: int) -> bool:
    """Whether a process sleeps in a system call."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == str(_NUMBERS[name])


def set_thread_credentials(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """Give the calling thread, and no other, these ids; raises OSError."""
    syscall("setgroups", len(groups), (ctypes.c_uint32 * len(groups))(*groups))
    syscall("setresgid", gid, gid, gid)
    syscall("setresuid", uid, uid, uid)
