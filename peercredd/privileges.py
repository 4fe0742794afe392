"""A process without privileges: what it gives up, and what the kernel says it still has.

Capabilities belong to a thread. glibc makes all threads change their ids with the one that
calls setresuid(2) (nptl(7)), and the kernel empties the capability sets of each thread that
stops to be root. So there is a time before threads (`forgo`), and one after (`become`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pwd
import signal
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

import structlog

CAP_BPF: Final = 39
_FALLBACK_USER: Final = "nobody"
_ENDING_SECONDS: Final = 10.0
_OVERFLOW_ID: Final = 65534
"""What `nobody` is where nobody has written it down."""

# <linux/prctl.h>
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_KEEPCAPS: Final = 8
_PR_SET_NAME: Final = 15
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38

_CAPABILITY_VERSION_3: Final = 0x20080522

# enum bpf_cmd of <linux/bpf.h>
_BPF_COMMANDS: Final = {
    "BPF_MAP_LOOKUP_ELEM": 1,
    "BPF_MAP_UPDATE_ELEM": 2,  # of the one map that is not open read-only, `watched`
    "BPF_MAP_GET_NEXT_KEY": 4,
    "BPF_OBJ_GET_INFO_BY_FD": 15,
    "BPF_MAP_LOOKUP_BATCH": 24,
}
_CLONE_NEW: Final = 0x7E020080
"""All flags of clone(2) for a new namespace."""
_CLONE_THREAD: Final = 0x00010000

_ALLOWED_CALLS: Final = (
    # reading and writing what is open
    *("read", "readv", "pread64", "write", "writev", "pwrite64", "lseek", "close", "close_range"),
    *("dup", "dup2", "dup3", "pipe2", "fsync"),
    # files: which of them, their owners and modes decide
    *("open", "openat", "stat", "fstat", "lstat", "newfstatat", "statx", "readlink", "readlinkat"),
    *("access", "faccessat", "faccessat2", "getdents64", "getcwd", "unlink", "unlinkat"),
    # sockets; neither connect(2), as it has nobody to call, nor listen(2), as it does so already
    *("bind", "accept", "accept4", "shutdown"),
    *("getsockname", "getpeername", "getsockopt", "setsockopt", "recvfrom", "recvmsg"),
    # waiting
    *("poll", "ppoll", "select", "pselect6", "epoll_create1", "epoll_ctl", "epoll_wait"),
    *("epoll_pwait", "epoll_pwait2", "eventfd2", "timerfd_create", "timerfd_settime"),
    *("nanosleep", "clock_nanosleep", "restart_syscall", "pause"),
    # memory
    *("brk", "mmap", "munmap", "mprotect", "mremap", "madvise", "membarrier"),
    # threads
    *("futex", "futex_wait", "futex_wake", "futex_waitv", "set_robust_list", "rseq"),
    *("set_tid_address", "sched_yield", "sched_getaffinity", "sched_getparam"),
    *("sched_getscheduler", "sched_setscheduler", "getcpu", "exit", "exit_group"),
    # signals
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "sigaltstack"),
    # about itself and the clock
    *("getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getgroups"),
    *("getrlimit", "getrusage", "sysinfo", "times", "uname", "getrandom"),
    *("clock_gettime", "clock_getres", "gettimeofday", "time"),
)

# What a terminal is not told by: TIOCSTI would type into that of the administrator.
_IOCTLS: Final = (termios.FIONBIO, termios.FIONREAD, termios.FIOCLEX, termios.TCGETS)
# Not F_SETOWN and F_SETSIG, which send signals.
_FCNTL_COMMANDS: Final = (
    *(fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD),
    *(fcntl.F_GETFL, fcntl.F_SETFL),
)
_INT: Final = 0xFFFFFFFF
_SOCKET_FLAGS: Final = socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK

_libc: Final = ctypes.CDLL(None, use_errno=True)

log = structlog.get_logger()


class PrivilegeError(Exception):
    """Privileges could not be given up. One line: which, and what mends it."""


class User(NamedTuple):
    """Whom the server becomes."""

    name: str
    uid: int
    gid: int


def user(name: str) -> User:
    """Find the user of that name; where there is none, `nobody`, and a warning.

    Never root: a server that the missing user leaves with all privileges would be what
    nobody notices.

    Raises:
        PrivilegeError: it is root.
    """
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        found = None
    if found is None:
        log.warning(
            "no such user, so the server runs as nobody, which others may do too; create it "
            "and restart",
            user=name,
        )
        try:
            nobody = pwd.getpwnam(_FALLBACK_USER)
        except KeyError:
            return User(_FALLBACK_USER, _OVERFLOW_ID, _OVERFLOW_ID)
        return User(_FALLBACK_USER, nobody.pw_uid, nobody.pw_gid)
    if 0 in (found.pw_uid, found.pw_gid):
        raise PrivilegeError(
            f"api.user: {name} is root, or in root's group, and the server must not be; name "
            "a user that owns nothing"
        )
    return User(name, found.pw_uid, found.pw_gid)


def die_with(parent: int) -> bool:
    """Have the kernel kill this process when its parent ends; False if that has happened.

    To be said anew after ids have changed: the kernel forgets it then (prctl(2)).
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def forgo() -> None:
    """Give up for good the rights of setuid programs and of files with capabilities.

    The caller is the only thread: those made later inherit it.

    Raises:
        PrivilegeError: the kernel does not let go of them.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if ctypes.get_errno() != errno.EINVAL:  # which says that there is no such capability
        raise _failed("the capability bounding set cannot be emptied")


def become(whom: User, *, keep_bpf: bool = False) -> None:
    """Have all threads run as that user, without supplementary groups and capabilities.

    Args:
        whom: not root.
        keep_bpf: leave CAP_BPF to the calling thread, and to those it makes from now on.

    Raises:
        PrivilegeError: a thread is more than that afterwards.
    """
    if keep_bpf:
        _prctl(_PR_SET_KEEPCAPS, 1)
    try:
        os.setgroups([])
        os.setresgid(whom.gid, whom.gid, whom.gid)
        os.setresuid(whom.uid, whom.uid, whom.uid)
    except OSError as error:
        raise PrivilegeError(
            f"the server cannot become {whom.name}: {error.strerror}; run peercredd as root"
        ) from error
    if keep_bpf:
        _prctl(_PR_SET_KEEPCAPS, 0)
    # With the sysctl fs.suid_dumpable=1, whoever is that user too could ptrace(2) it.
    _prctl(_PR_SET_DUMPABLE, 0)
    _set_capabilities({CAP_BPF} if keep_bpf else ())
    _require_unprivileged(whom, 1 << CAP_BPF if keep_bpf else 0)


def works_without(attempt: Callable[[], object]) -> bool:
    """Whether something can be done by `nobody` without capabilities, as a fork of this tries.

    The caller is the only thread.

    Before 5.19 (c8644cd0efe7) the sysctl kernel.unprivileged_bpf_disabled closed all of bpf(2),
    descriptors or not.
    """
    child = os.fork()
    if not child:
        try:
            become(User(_FALLBACK_USER, _OVERFLOW_ID, _OVERFLOW_ID))
            attempt()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def filter_system_calls() -> str | None:
    """Have the kernel refuse all threads what the server never calls.

    bpf(2) is left to read maps, and the state of what is attached: who holds the descriptor
    of a link could detach it.

    What is refused looks as on a kernel without it (ENOSYS), which libraries can live with.

    Returns:
        Why that is not so; None if it is.
    """
    try:
        import seccomp
    except ImportError:
        return "the Python module seccomp is missing; install python3-seccomp"
    try:
        calls = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
        calls.set_attr(seccomp.Attr.CTL_TSYNC, 1)
        for name in _ALLOWED_CALLS:
            # Of names, a library or a processor may not know some.
            if seccomp.resolve_syscall(seccomp.Arch(), name) >= 0:
                calls.add_rule(seccomp.ALLOW, name)
        for request in _IOCTLS:
            calls.add_rule(seccomp.ALLOW, "ioctl", seccomp.Arg(1, seccomp.EQ, request))
        for command in _FCNTL_COMMANDS:
            calls.add_rule(seccomp.ALLOW, "fcntl", seccomp.Arg(1, seccomp.EQ, command))
        for family in (socket.AF_INET, socket.AF_INET6):
            # To see whether an address is the host's. Over AF_UNIX it could hand on what it holds.
            calls.add_rule(
                seccomp.ALLOW,
                "socket",
                seccomp.Arg(0, seccomp.EQ, family),
                seccomp.Arg(1, seccomp.MASKED_EQ, _INT & ~_SOCKET_FLAGS, socket.SOCK_DGRAM),
                seccomp.Arg(2, seccomp.EQ, 0),
            )
        # Fast Open is a connect(2) by another name.
        connects_not = seccomp.MASKED_EQ, socket.MSG_FASTOPEN, 0
        calls.add_rule(
            seccomp.ALLOW,
            "sendto",
            seccomp.Arg(3, *connects_not),
            seccomp.Arg(4, seccomp.EQ, 0),  # to whom it is connected
        )
        calls.add_rule(seccomp.ALLOW, "sendmsg", seccomp.Arg(2, *connects_not))
        for number in _BPF_COMMANDS.values():
            calls.add_rule(seccomp.ALLOW, "bpf", seccomp.Arg(0, seccomp.EQ, number))
        # A thread, and no process: none can outlive the server.
        threads = seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_NEW | _CLONE_THREAD, _CLONE_THREAD)
        calls.add_rule(seccomp.ALLOW, "clone", threads)
        calls.add_rule(seccomp.ALLOW, "prctl", seccomp.Arg(0, seccomp.EQ, _PR_SET_NAME))
        # To read limits, and to end itself by a signal.
        calls.add_rule(seccomp.ALLOW, "prlimit64", seccomp.Arg(2, seccomp.EQ, 0))
        calls.add_rule(seccomp.ALLOW, "tgkill", seccomp.Arg(0, seccomp.EQ, os.getpid()))
        calls.syscall_priority("bpf", 255)
        calls.load()
    except (OSError, RuntimeError, ValueError) as error:
        return f"the kernel does not take the filter: {error}"
    return None


def _require_unprivileged(whom: User, of_this_thread: int) -> None:
    # A thread that just ends is left alone by glibc, and runs no code of anybody's any more.
    deadline = time.monotonic() + _ENDING_SECONDS
    while privileged := _privileged_threads(whom, of_this_thread):
        if time.monotonic() > deadline:
            raise PrivilegeError(f"threads {privileged} kept privileges; tell the authors")
        time.sleep(0.001)


def _privileged_threads(whom: User, of_this_thread: int) -> list[str]:
    this = os.getpid()
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            lines = (task / "status").read_text(errors="replace").splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        ids = {*map(int, status["Uid"].split())}, {*map(int, status["Gid"].split())}
        capabilities = {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")}
        allowed = {0, of_this_thread} if int(task.name) == this else {0}
        if (
            ids != ({whom.uid}, {whom.gid})
            or status["Groups"].split()
            or not capabilities <= allowed
        ):
            found.append(task.name)
    return found


def _set_capabilities(capabilities: Iterable[int]) -> None:
    sets = sum(1 << capability for capability in capabilities)
    low, high = sets & 0xFFFFFFFF, sets >> 32
    # Effective, permitted, inheritable; the low halves first: capset(2).
    data = struct.pack("=6I", low, low, 0, high, high, 0)
    if _libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), data):
        raise _failed("capabilities cannot be set")


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0):
        raise _failed(f"prctl({option}) fails")


def _failed(what: str) -> PrivilegeError:
    return PrivilegeError(f"{what}: {os.strerror(ctypes.get_errno())}; run peercredd as root")
