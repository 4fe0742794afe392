"""What an actor can be told to do. Standard library only: actors run without the project.

A step that belongs to a conversation does its work on both transports, AF_UNIX first,
then TCP, in the same task: whatever the task is at that moment, it is for both.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import termios
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

from harness import so_peercred
from harness.channel import Descriptor
from harness.io_uring import Mode, Ring, sockaddr
from harness.so_peercred import Peer
from harness.syscalls import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    set_thread_credentials,
    syscall,
)

IPPROTO_MPTCP = 262
TCP_FASTOPEN_CONNECT = 30
TCPI_OPT_SYN_DATA = 32
IPV6_ADDRFORM = 1
TCP_ESTABLISHED = 1
TCP_FIN_WAIT1 = 4
TCP_CLOSE = 7
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Both(NamedTuple, Generic[T]):
    """The same thing on the two transports."""

    unix: T
    tcp: T


Address = tuple[Any, ...]
DEFER_ACCEPT = (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)
"""On a listener: its sockets are born at their client's first byte."""

Addresses = Both[Any]
"""Where to connect: an abstract AF_UNIX name, and (host, port)."""
ThreadCredentials = tuple[int, int, tuple[int, ...]]
"""Uid, gid and supplementary groups."""
Option = tuple[int, int, int]
"""Level, name and value of a socket option."""


@dataclass(frozen=True)
class Route:
    """How the two ends of a TCP connection spell each other's address."""

    name: str
    bound: str
    target: str
    server_family: socket.AddressFamily
    client_family: socket.AddressFamily
    server_protocol: int = 0
    client_protocol: int = 0
    scope: str | None = None
    """The device of a link-local address."""

    def __str__(self) -> str:
        return self.name


class Extent(NamedTuple):
    """A line of a user namespace's uid_map or gid_map, user_namespaces(7)."""

    inside: int
    outside: int
    """As the parent namespace knows it."""
    length: int


def become(uid: int, gid: int | None = None, groups: Iterable[int] = ()) -> None:
    """Give up root for good, in every thread."""
    os.setgroups(list(groups))
    gid = uid if gid is None else gid
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def if_permitted(step: Callable[..., object], *arguments: object) -> bool:
    """Do the step unless the kernel forbids it; True when it was done."""
    try:
        step(*arguments)
    except PermissionError:
        return False
    return True


def in_thread(
    credentials: ThreadCredentials | None,
    step: Callable[P, R],
    *arguments: P.args,
    **named: P.kwargs,
) -> tuple[int, R]:
    """Do the step in a thread, with ids of its own if given; returns its tid too."""
    answers: list[tuple[int, R]] = []
    errors: list[Exception] = []
    tids: list[int] = []

    def run() -> None:
        tids.append(threading.get_native_id())
        try:
            if credentials:
                set_thread_credentials(*credentials)
            answers.append((tids[0], step(*arguments, **named)))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    _wait_until_gone(tids[0])
    if errors:
        raise errors[0]
    return answers[0]


def _wait_until_gone(tid: int) -> None:
    """Wait until the kernel has no such thread of ours, which is after join() returns.

    glibc's setresuid() aborts the process when it succeeds in one thread and fails in
    another, which may have ids of its own.
    """
    while Path(f"/proc/self/task/{tid}").exists():
        os.sched_yield()


def in_thread_if_permitted(
    credentials: ThreadCredentials | None, step: Callable[..., R], *arguments: object
) -> R:
    """Do the step in a thread, with ids of its own unless the kernel forbids them."""

    def run() -> R:
        if credentials:
            if_permitted(set_thread_credentials, *credentials)
        return step(*arguments)

    return in_thread(None, run)[1]


def connect_in_threads(uids: list[int], target: Any) -> dict[int, int]:
    """Connect from as many threads at once, each with a uid; returns it by local port."""
    barrier = threading.Barrier(len(uids))
    by_port: dict[int, int] = {}

    def run(uid: int) -> None:
        set_thread_credentials(uid, uid, ())
        sock = socket.socket()
        barrier.wait()
        sock.connect(target)
        by_port[sock.getsockname()[1]] = uid
        sock.detach()

    threads = [threading.Thread(target=run, args=(uid,)) for uid in uids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        assert thread.native_id
        _wait_until_gone(thread.native_id)
    return by_port


def bind(route: Route, port: int = 0, options: Iterable[Option] = ()) -> Both[int]:
    """Sockets bound to addresses of their own, not listening yet."""
    unix = socket.socket(socket.AF_UNIX)
    unix.bind("")
    tcp = socket.socket(route.server_family, socket.SOCK_STREAM, route.server_protocol)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if route.server_family == socket.AF_INET6:
        tcp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    for option in options:
        tcp.setsockopt(*option)
    scope = (0, socket.if_nametoindex(route.scope)) if route.scope else ()
    tcp.bind((route.bound, port, *scope))
    return Both(unix.detach(), tcp.detach())


def listen(fds: Both[int], backlog: int = 128) -> None:
    """Listen on both; at once, or again."""
    for fd in fds:
        with _borrow(fd) as sock:
            sock.listen(backlog)


def addresses(fds: Both[int], route: Route) -> Addresses:
    """Where a client of these listeners is to connect."""
    with _borrow(fds.unix) as unix, _borrow(fds.tcp) as tcp:
        scope = (0, socket.if_nametoindex(route.scope)) if route.scope else ()
        return Both(unix.getsockname(), (route.target, tcp.getsockname()[1], *scope))


def sockets(
    route: Route, local: Address | None = None, options: Iterable[Option] = ()
) -> Both[int]:
    """A client's sockets; TCP's is bound to `local`, if given, whoever had it before."""
    tcp = socket.socket(route.client_family, socket.SOCK_STREAM, route.client_protocol)
    for option in options:
        tcp.setsockopt(*option)
    if local is not None:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind(local)
    return Both(unix_socket(), tcp.detach())


def open_socket(family: int, kind: int, protocol: int) -> int:
    """socket()."""
    return socket.socket(family, kind, protocol).detach()


def unix_socket() -> int:
    """A client's AF_UNIX socket."""
    return socket.socket(socket.AF_UNIX).detach()


def connect(fds: Both[int], targets: Addresses) -> None:
    """connect(), blocking."""
    for fd, target in zip(fds, targets, strict=True):
        with _borrow(fd) as sock:
            sock.connect(target)


def connect_one(fd: int, target: Any) -> None:
    """connect() on one transport."""
    with _borrow(fd) as sock:
        sock.connect(target)


def connect_nonblocking(fds: Both[int], targets: Addresses) -> None:
    """connect() that returns at once."""
    for fd, target in zip(fds, targets, strict=True):
        start_connect(fd, target)


def start_connect(fd: int, target: Any) -> None:
    """connect() on one transport that returns at once."""
    with _borrow(fd) as sock:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect(target)


def connect_fast_open(fds: Both[int], targets: Addresses) -> None:
    """connect() by sending: the first byte travels in the SYN."""
    connect_one(fds.unix, targets.unix)
    fast_open(fds.tcp, targets.tcp)


def fast_open(fd: int, target: Any) -> None:
    """connect() of a TCP socket by sending a byte, where clients may without a cookie."""
    with _borrow(fd) as sock:
        sock.sendto(b"x", socket.MSG_FASTOPEN, target)


def connect_deferred(fds: Both[int], targets: Addresses) -> None:
    """connect() that only promises: TCP's SYN leaves at the first write."""
    connect_one(fds.unix, targets.unix)
    defer(fds.tcp, targets.tcp)


def defer(fd: int, target: Any) -> None:
    """connect() of a TCP socket that only promises."""
    with _borrow(fd) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        sock.connect(target)


def defer_and_write(fd: int, target: Any) -> None:
    """connect() of a TCP socket that only promises, and the write that keeps the promise."""
    defer(fd, target)
    os.write(fd, b"x")


class ByRing:
    """connect() through io_uring; with `uid`, under credentials registered for that user."""

    def __init__(self, mode: Mode, uid: int | None = None) -> None:
        self.mode, self.uid = mode, uid

    def __repr__(self) -> str:
        return f"ByRing({self.mode}, {self.uid})"

    def __call__(self, fds: Both[int], targets: Addresses) -> None:
        ring = Ring(self.mode)
        personality = _personality(ring, self.uid)
        for fd, target in zip(fds, targets, strict=True):
            with _borrow(fd) as sock:
                ring.connect(fd, sockaddr(sock.family, target), personality)
        ring.close()


class SendByRing:
    """send() through io_uring; with `uid`, under credentials registered for that user."""

    def __init__(self, mode: Mode, uid: int | None = None) -> None:
        self.mode, self.uid = mode, uid

    def __call__(self, fd: int, data: bytes) -> None:
        ring = Ring(self.mode)
        ring.send(fd, data, _personality(ring, self.uid))
        ring.close()


def _personality(ring: Ring, uid: int | None) -> int:
    """Register credentials with that effective uid; 0, the task's own, for None."""
    if uid is None:
        return 0
    own = os.geteuid()
    os.setresuid(-1, uid, -1)
    personality = ring.register_credentials()
    os.setresuid(-1, own, -1)
    return personality


def accept(fds: Both[int]) -> Both[int]:
    """accept() on both, blocking."""
    return Both(*(accept_one(fd) for fd in fds))


def accept_one(fd: int) -> int:
    """accept() on one transport, blocking."""
    with _borrow(fd) as sock:
        sock.setblocking(True)
        return sock.accept()[0].detach()


def accept_without_flags(fd: int) -> int:
    """accept(2) on one transport, blocking, where Python calls accept4(2)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    accepted: int = libc.accept(fd, None, None)
    if accepted < 0:
        raise OSError(ctypes.get_errno(), "accept")
    return accepted


def accept_nonblocking(fd: int) -> int:
    """accept() on one transport that has nothing to wait for any more."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll()
    with _borrow(fd) as sock:
        sock.setblocking(False)
        accepted = sock.accept()[0]
        accepted.setblocking(True)
        return accepted.detach()


class AcceptByRing:
    """accept() through io_uring; with `uid`, under credentials registered for that user."""

    def __init__(self, mode: Mode, uid: int | None = None) -> None:
        self.mode, self.uid = mode, uid

    def __call__(self, fd: int) -> int:
        ring = Ring(self.mode)
        try:
            return ring.accept(fd, _personality(ring, self.uid))
        finally:
            ring.close()


def accept_any(fds: tuple[int, ...]) -> tuple[int, int]:
    """The first of the listeners to have a connection, and that connection."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    first = poll.poll()[0][0]
    return first, accept_one(first)


def readable(fd: int) -> bool:
    """True when accept() or recv() would not wait."""
    return bool(select.select([fd], [], [], 0)[0])


def write(fds: Both[int], data: bytes = b"x") -> None:
    """write() on both."""
    for fd in fds:
        os.write(fd, data)


def read(fds: Both[int]) -> Both[bytes]:
    """read() on both, blocking."""
    return Both(os.read(fds.unix, 4096), os.read(fds.tcp, 4096))


def close(fds: Iterable[int]) -> None:
    """close() each."""
    for fd in fds:
        os.close(fd)


def reset(fd: int) -> None:
    """close() with a RST: the other end learns of it, and its socket is CLOSE at once."""
    with contextlib.closing(socket.socket(fileno=fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reset_delivered(fd: int) -> None:
    """`reset`, once the other end has acknowledged all that was sent."""
    while struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)))[0]:
        os.sched_yield()
    reset(fd)


def shutdown(fd: int, how: int) -> None:
    """shutdown() of one socket."""
    with _borrow(fd) as sock:
        sock.shutdown(how)


def turn_into_v4(fd: int) -> None:
    """Make a connected socket with v4-mapped addresses one of IPv4."""
    with _borrow(fd) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_ADDRFORM, socket.AF_INET)


def disconnect(fd: int) -> None:
    """connect() to AF_UNSPEC: a TCP socket forgets its peer and can be used anew."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(fd, struct.pack("=H14x", socket.AF_UNSPEC), 16):
        raise OSError(ctypes.get_errno(), "connect(AF_UNSPEC)")


def wait_until_hung_up(fd: int) -> None:
    """Wait until the other end has closed or reset."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    poll.poll()


def wait_until_acknowledged(fd: int) -> None:
    """Wait until the other end has acknowledged that this TCP socket was shut down."""
    while tcp_info(fd)[0] == TCP_FIN_WAIT1:
        os.sched_yield()


def wait_until_closed(fd: int) -> None:
    """Wait until a TCP socket whose both directions were shut down is CLOSE."""
    while tcp_info(fd)[0] != TCP_CLOSE:
        os.sched_yield()


def tcp_info(fd: int) -> tuple[int, int]:
    """A TCP socket's state, and the options its handshake used (TCPI_OPT_*)."""
    with _borrow(fd) as sock:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return info[0], info[5]


def own_name(fd: int) -> Address:
    """getsockname()."""
    with _borrow(fd) as sock:
        name: Address = sock.getsockname()
        return name


def wait_until_connected(fd: int) -> None:
    """Wait until a connect() that has begun ends; raises what it ends with."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
    with _borrow(fd) as sock:
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))


def write_when_connected(fd: int) -> None:
    """Write to a socket whose connect() has begun, as soon as that has ended."""
    wait_until_connected(fd)
    os.write(fd, b"x")


def names(fd: int) -> tuple[Address, Address]:
    """getsockname() and getpeername()."""
    with _borrow(fd) as sock:
        return sock.getsockname(), sock.getpeername()


def peer(fd: int) -> Peer:
    """What the kernel says of the other end, in the numbers of the actor's own namespaces."""
    with _borrow(fd) as sock:
        return so_peercred.peer(sock)


def tcp_peer(fd: int) -> tuple[so_peercred.Credentials, tuple[int, ...] | None]:
    """What a TCP socket itself says of the other end, likewise."""
    with _borrow(fd) as sock:
        return so_peercred.tcp_peer(sock)


def give(fds: Iterable[int]) -> list[Descriptor]:
    """The sockets themselves, for whoever asked."""
    return [Descriptor(fd) for fd in fds]


def take(descriptors: Iterable[Descriptor]) -> list[int]:
    """The numbers under which sockets from elsewhere are known here."""
    return [int(descriptor) for descriptor in descriptors]


def run_with_stdout(program: str, argument: str, stdout: int) -> None:
    """Run a program whose standard output is `stdout`, and wait for it to end."""
    pid = os.fork()
    if not pid:
        try:
            os.dup2(stdout, 1)
            os.execv(program, [program, argument])
        finally:
            os._exit(127)
    if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise ChildProcessError(f"{program} ended with {status}")


def enter_network_namespace(namespace: Descriptor) -> None:
    """Sockets made from now on belong to `namespace`."""
    syscall("setns", int(namespace), CLONE_NEWNET)
    os.close(namespace)


def unshare(kinds: int) -> None:
    """Leave for new namespaces, CLONE_NEW* of syscalls.py; a pid namespace is for children only."""
    syscall("unshare", kinds)


def write_id_map(pid: int, name: str, extents: Iterable[Extent]) -> None:
    """Say which ids another process's user namespace has; `name` is "uid_map" or "gid_map"."""
    # The kernel takes one write() only.
    lines = "".join(f"{each.inside} {each.outside} {each.length}\n" for each in extents)
    Path(f"/proc/{pid}/{name}").write_bytes(lines.encode())


def found_namespaces(kinds: int, uid: int) -> None:
    """Become, as that user and nobody more, the root of a new user namespace, and of `kinds`."""
    syscall("unshare", CLONE_NEWUSER | kinds)
    make_dumpable()
    Path("/proc/self/setgroups").write_text("deny")
    for name in ("uid_map", "gid_map"):
        write_id_map(os.getpid(), name, [Extent(0, uid, 1)])


def bring_loopback_up() -> None:
    """Let loopback work in a new network namespace."""
    request = struct.pack("16sh14x", b"lo", IFF_UP)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, request)


def descend(levels: int) -> None:
    """As many user namespaces down, each in the one before and with a single id."""
    for _ in range(levels):
        uid, gid = os.geteuid(), os.getegid()
        unshare(CLONE_NEWUSER)
        make_dumpable()
        Path("/proc/self/setgroups").write_text("deny")
        write_id_map(os.getpid(), "uid_map", (Extent(0, uid, 1),))
        write_id_map(os.getpid(), "gid_map", (Extent(0, gid, 1),))


def make_dumpable() -> None:
    """Own the files of /proc/PID again, which a change of ids without execve() has taken away."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def set_comm(name: bytes) -> None:
    """Choose the name of this thread: at most 15 bytes, any but NUL."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NAME, name, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NAME)")


def connect_many(target: Any, count: int, how: str) -> list[int]:
    """Connect that often over TCP and keep the sockets.

    `how` is "silent", to send nothing, or "half-closed", to send no more.
    """
    made = []
    for _ in range(count):
        sock = socket.create_connection(target)
        if how == "half-closed":
            sock.shutdown(socket.SHUT_WR)
        made.append(sock.detach())
    return made


def kill_self() -> None:
    """Die of SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


class _borrow:  # noqa: N801 - reads as the function it is
    """A socket object over a descriptor that stays open afterwards."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)

    def __enter__(self) -> socket.socket:
        return self._sock

    def __exit__(self, *_: object) -> None:
        self._sock.detach()


def talk_to_oneself(route: Route, count: int) -> None:
    """Make TCP connections to a listener of one's own, each over at once."""
    with socket.create_server((route.bound, 0), family=route.server_family) as listener:
        address = (route.target, listener.getsockname()[1])
        for _ in range(count):
            with socket.create_connection(address):
                listener.accept()[0].close()
