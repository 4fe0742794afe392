"""What the daemon's answers look like in Python: frozen, typed, absent is None."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Literal, Self

from peercred.errors import InvalidArgument


class End(Enum):
    """One of the two ends of a connection."""

    CLIENT = "client"
    SERVER = "server"


class Basis(Enum):
    """What an answer rests on: the asking socket itself, or addresses and ports alone."""

    SOCKET = "socket"
    TUPLE = "tuple"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address and a port. A v4-mapped IPv6 address is held as the IPv4 address."""

    address: IPv4Address | IPv6Address
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespaces:
    """Whose numbers process ids, and user and group ids, are.

    Inode numbers, as in /proc/PID/ns; None is the initial namespace.
    """

    pid: int | None = None
    user: int | None = None

    @classmethod
    def own(cls) -> Self:
        """Those that this process is in."""
        return cls.of("self")

    @classmethod
    def of(cls, pid: int | Literal["self"]) -> Self:
        """Those that a process is in, which may be another user's for root only.

        Raises:
            InvalidArgument: There is no such process, or you may not look at it.

        """
        folder = Path("/proc", str(pid), "ns")
        try:
            return cls(pid=(folder / "pid").stat().st_ino, user=(folder / "user").stat().st_ino)
        except FileNotFoundError:
            raise InvalidArgument(f"there is no process {pid}; see `ps`", "pid") from None
        except OSError as error:
            raise InvalidArgument(
                f"the namespaces of process {pid} cannot be seen: {error.strerror}; be its user, "
                "or root",
                "pid",
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Credentials of a task when it called connect(), listen() or accept().

    Numbers are those of the initial namespaces, unless a lookup named others. ``None`` is
    unknown: the kernel does not provide the field, or it has no number there.
    """

    pid: int
    """Thread group id, as SO_PEERCRED has it: 0 where the process is not visible in the
    namespace a lookup named."""
    uid: int
    """Effective user id, as SO_PEERCRED has it."""
    gid: int
    """Effective group id, as SO_PEERCRED has it."""
    tid: int | None = None
    real_uid: int | None = None
    real_gid: int | None = None
    saved_uid: int | None = None
    saved_gid: int | None = None
    filesystem_uid: int | None = None
    filesystem_gid: int | None = None
    groups: tuple[int, ...] = ()
    """Supplementary groups: the first 32 of `group_count`."""
    group_count: int | None = None
    groups_truncated: bool = False
    process_start_time_ns: int | None = None
    """Start of the process, ns since boot: tells a reused pid."""
    comm: str | None = None
    """Thread name, bytes that are no UTF-8 written as ``\\xNN``. Chosen by the process."""
    effective_capabilities: int | None = None
    """Bit N is capability number N of capabilities(7)."""
    no_new_privs: bool | None = None
    login_uid: int | None = None
    """Audit login uid; None where none was set."""
    audit_session_id: int | None = None
    cgroup_id: int | None = None
    pid_namespace: int | None = None
    """Inode number, as in /proc/PID/ns/pid."""
    user_namespace: int | None = None
    network_namespace: int | None = None
    time_ns: int | None = None
    """When they were taken, ns since boot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCredentials(Credentials):
    """Who is at the other end: the answer to a lookup."""

    peer_end: End
    """Which end these credentials are of: the one opposite to the asker."""
    basis: Basis
    namespaces: Namespaces
    """Whose numbers these are, and those of `acceptor`; both are always there."""
    server_socket_cookie: int
    client_socket_cookie: int
    netns_cookie: int
    established_time_ns: int
    acceptor: Credentials | None = None
    """Who called accept(), at the server's end whichever end asks: a fact beside the answer, never
    the answer. None where nobody has yet, where accept() was called before the capture began, and
    always with the hook set "cgroup"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One recorded connection, both ends."""

    client_endpoint: Endpoint
    server_endpoint: Endpoint
    client: Credentials
    """Who called connect()."""
    listener: Credentials | None
    """Who called listen(); None where the listener is older than the capture."""
    server_socket_cookie: int
    client_socket_cookie: int
    listener_socket_cookie: int | None
    netns_cookie: int
    established_time_ns: int
    acceptor: Credentials | None = None
    """Who called accept(); None as in `PeerCredentials`."""


class EventKind(Enum):
    """What a watcher is told."""

    PRESENT = "present"
    """A connection was there when the watching began."""
    SYNCHRONIZED = "synchronized"
    """All that were present have been told of."""
    ESTABLISHED = "established"
    """A connection was established; nobody has accepted it yet."""
    RETIRED = "retired"
    """Nobody can ask about a connection any more, from either end."""
    MISSED = "missed"
    """Connections came that this watcher was, and will be, told nothing of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionEvent:
    """Something that a watcher is told."""

    kind: EventKind
    connection: Connection | None = None
    """As it was when it was told of first. None with SYNCHRONIZED and MISSED."""
    missed: int = 0
    """Of MISSED: how many in all, since the watching began."""


@dataclass(frozen=True, slots=True)
class Table:
    """One BPF map of the capture, and how full it is."""

    name: str
    entries: int
    max_entries: int
    max_entries_per_user: int | None = None
    """How many of these may be one user's. None where the daemon is too old to tell."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Something that was not recorded: how often, and why."""

    reason: str
    count: int
    description: str


@dataclass(frozen=True, slots=True)
class Attachment:
    """One BPF program, and whether it is in its place now."""

    program: str
    attached: bool
    run_count: int | None = None
    """None unless the kernel counts: sysctl kernel.bpf_stats_enabled=1."""
    missed_count: int | None = None
    """How often the kernel left it out, as it was running on that CPU already. None where it
    never does (hook set "cgroup"), or does not tell."""


@dataclass(frozen=True, slots=True)
class UnusedHookSet:
    """A hook set that does not capture, and why not."""

    hook_set: str
    reason: str


@dataclass(frozen=True, slots=True)
class SoPeercred:
    """Where getsockopt(SO_PEERCRED) on TCP is asked for, or answered."""

    target: str
    """As it was named: "all", the path of a cgroup, or a systemd unit."""
    source: str
    """Who asked: "config", "enabled" (at run time), "transient" (likewise, until the cgroup goes
    or the capture ends), or "leftover" (nobody any more; it ends at the next change)."""
    cgroup: str | None
    """The directory that the target means now; None when that is not known."""
    attached: bool
    """Whether getsockopt() is answered there now."""
    waiting: bool = False
    """Whether that begins by itself as soon as the cgroup is made."""
    detail: str = ""
    """Why it is not attached."""


class Transport(Enum):
    """How a question reaches the daemon."""

    UNIX_SOCKET = "unix socket"
    LOOPBACK_TCP = "loopback TCP"


class Scope(Enum):
    """Which connections you may learn about."""

    ALL = "all"
    OWN = "own"
    """Those that you serve, and of those that you made who listens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who the daemon takes you for, and what you may ask."""

    transport: Transport
    scope: Scope
    reason: str
    """Why it is that scope, for people."""
    caller: Credentials | None
    """Of your connection to the daemon, in numbers of the initial namespaces; None on the unix
    socket, where the daemon is not told."""
    listener_details: bool
    """Whether clients learn more of others' listeners than SO_PEERCRED would tell."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that callers on loopback TCP asked for and did not get."""

    reason: str
    count: int
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the daemon says of itself."""

    version: str
    hook_set: str
    """The one that captures: "trace" or "cgroup"."""
    kernel_release: str
    cgroup: str
    capture_start_time: datetime
    capture_start_time_ns: int
    tables: tuple[Table, ...]
    drops: tuple[Drop, ...]
    missing_fields: tuple[str, ...]
    attachments: tuple[Attachment, ...]
    daemon_pid: int
    """The one to send signals to."""
    netns_cookie: int
    unused_hook_sets: tuple[UnusedHookSet, ...] = ()
    so_peercred: tuple[SoPeercred, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    """Since the daemon started."""
    scope: Scope = Scope.ALL
    """With OWN nothing is said that tells of others: `cgroup` is empty, and so are all tables,
    drops, cgroups that SO_PEERCRED is answered in, and refusals."""
    server_pid: int = 0
    """The process that answers, a child of the daemon; 0 if the daemon does not say."""
    problems: tuple[str, ...] = ()
    """Why the health service says NOT_SERVING now; empty while all is well."""
