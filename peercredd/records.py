"""What the BPF programs write down, decoded.

The structs are those of bpf/records.h; ``tests/kernel/test_layout.py`` compares
every offset with what BCC compiled.
"""

from __future__ import annotations

import struct
import sys
from typing import NamedTuple, TypeAlias

MAX_GROUPS = 32
MAX_PID_LEVELS = 6

HAS_NO_NEW_PRIVS = 1 << 0
HAS_LOGIN_UID = 1 << 1
HAS_AUDIT_SESSION_ID = 1 << 2
HAS_CGROUP_ID = 1 << 3
HAS_PID_NAMESPACE = 1 << 4
HAS_USER_NAMESPACE = 1 << 5
HAS_NETWORK_NAMESPACE = 1 << 6
HAS_START_TIME = 1 << 7
HAS_CAPABILITIES = 1 << 8
NO_NEW_PRIVS = 1 << 16

WITHHELD = 1 << 31
"""Not the kernel's: set by a view on what its callers may know no more of than SO_PEERCRED and
SO_PEERGROUPS tell on a unix socket."""


class Credentials(NamedTuple):
    """``struct credentials``: the fields in the order of the C struct.

    `known` has a ``HAS_*`` bit for every optional field that this kernel
    provided; the value of one it did not is meaningless.
    """

    time_ns: int
    process_start_time_ns: int
    effective_capabilities: int
    cgroup_id: int
    tgid: int
    tid: int
    uid: int
    gid: int
    suid: int
    sgid: int
    euid: int
    egid: int
    fsuid: int
    fsgid: int
    login_uid: int
    audit_session_id: int
    pid_namespace: int
    user_namespace: int
    network_namespace: int
    known: int
    group_count: int
    comm: bytes
    groups: bytes
    """``group_count`` (at most MAX_GROUPS) native u32."""
    pid_level: int
    """How deep the task's pid namespace is nested; 0 is the initial one."""
    pids: bytes
    """For each level from 1 on (at most MAX_PID_LEVELS) two native u32: the tgid there, and the
    inode number of that pid namespace."""
    charged_uid: int
    """The user whose share of the tables it counts against."""


CREDENTIALS = struct.Struct(f"=4Q17I16s{MAX_GROUPS * 4}sI{MAX_PID_LEVELS * 8}sI4x")
CHARGED_UID_OFFSET = CREDENTIALS.size - struct.calcsize("=I4x")
"""Of charged_uid, which comes last."""
EUID_OFFSET = struct.calcsize("=4Q6I")
"""Of euid; nothing before it is padded."""


def groups(record: Credentials) -> memoryview:
    """The supplementary groups of a task: the first MAX_GROUPS of ``group_count``."""
    return memoryview(record.groups[: 4 * min(record.group_count, MAX_GROUPS)]).cast("I")


class Tuple(NamedTuple):
    """``struct tuple``: a connection's addresses, family-free, in its network namespace."""

    netns_cookie: int
    client_address: bytes
    """16 bytes; IPv4 as v4-mapped IPv6."""
    server_address: bytes
    client_port: int
    """Host byte order."""
    server_port: int


TUPLE = struct.Struct("=Q16s16sHH4x")

UNSET_ID = 0xFFFFFFFF
"""(uid_t)-1: audit's "not set"."""

V4_MAPPED = bytes(10) + b"\xff\xff"

PENDING_HEAD = struct.Struct("=QQII")
"""``struct pending`` up to its credentials: published_ns, client_cookie, initial_sequence and
client_gone."""
PENDING_SIZE = PENDING_HEAD.size + CREDENTIALS.size

CONNECTION_HEAD = struct.Struct("=4Q")
"""``struct connection``: established_ns, server_cookie, client_cookie, listener_cookie."""
CONNECTION_TUPLE_OFFSET = CONNECTION_HEAD.size
CONNECTION_ENDS = struct.Struct("=I5?7x")
"""`Ends`; behind the tuple."""
CONNECTION_ENDS_OFFSET = CONNECTION_TUPLE_OFFSET + TUPLE.size
CONNECTION_ACCEPTED = struct.Struct("=Q")
"""accepted_ns."""
CONNECTION_ACCEPTED_OFFSET = CONNECTION_ENDS_OFFSET + CONNECTION_ENDS.size
CLIENT_OFFSET = CONNECTION_ACCEPTED_OFFSET + CONNECTION_ACCEPTED.size
LISTENER_OFFSET = CLIENT_OFFSET + CREDENTIALS.size
ACCEPTOR_OFFSET = LISTENER_OFFSET + CREDENTIALS.size
CONNECTION_SIZE = ACCEPTOR_OFFSET + CREDENTIALS.size
_FROM_EUID_TO_EUID = CREDENTIALS.size - 4
_OWNERS = struct.Struct(
    f"=Q16xQ{CONNECTION_ACCEPTED_OFFSET - CONNECTION_HEAD.size}xQ"
    f"{EUID_OFFSET}xI{_FROM_EUID_TO_EUID}xI{_FROM_EUID_TO_EUID}xI"
)
"""established_ns, listener_cookie, accepted_ns, and each euid."""

USER = struct.Struct("=3i")
"""`Holdings`: the value of the maps ``users`` and ``users_over``."""
UID = struct.Struct("=I")
"""Key of these, and the value of ``reset_in_queue``."""
LEFT = struct.Struct("=i")
"""How many connections: the value of the maps ``left`` and ``left_over``."""
PAIR = struct.Struct("=II")
"""Key of these: the uids of who connected and of who listens."""
SETTINGS = struct.Struct("=QII3i4x")
"""``struct settings``, in its order."""
TOTALS = struct.Struct("=2Q")
"""``struct totals`` of one CPU: established, retired."""

ABOUT_SIZE = 4096

ABSENCE_REASON = 3
ABSENT_RETIRED = 1
ABSENCES = {ABSENT_RETIRED: "RETIRED", 2: "TABLE_WAS_FULL", 3: "NEVER_SEEN"}
"""Reasons in the map ``absences``, in the words of the API."""

DROPS = (
    ("PENDING_FULL", "connect() calls with no room in the table of pending ones"),
    ("CONNECTIONS_FULL", "connections with no room in the table of connections"),
    ("INDEX_FULL", "connections with no room in an index of the table"),
    ("NO_STORAGE", "sockets for which the kernel had no memory to keep credentials with"),
    ("CREDENTIALS_UNREADABLE", "calls of a task whose credentials could not be read"),
    ("DEFERRED_UNKNOWN", "deferred Fast Open connections whose connect() was not seen"),
    ("KERNEL_THREAD", "connections made by the kernel itself, with no user behind them"),
    ("OTHER_SYN", "server sockets born of another SYN than the one recorded for the tuple"),
    ("OVERTAKEN", "connections whose client vanished while its record was being written"),
    ("USER_OVER_SHARE", "connections of users who had as much of a table as one user may take"),
    ("EVENT_LOST", "connections, or their ends, that those who watch were not told of"),
)
"""``enum drop`` from 1 on: name, and what was dropped."""

ABSENCE_SLOTS = 1 << 15
_WORD_MASK = (1 << 64) - 1
_WORDS = struct.Struct("=6Q")
_WORD = struct.Struct("=Q")


def hash_of_cookie(cookie: int) -> int:
    """What stands for a socket in the maps ``absences`` and ``older``."""
    return _mixed(0, cookie)


def hash_of_tuple(key: bytes) -> int:
    """What stands there for a packed ``struct tuple``, as in bpf/core.h."""
    subject = 1
    for word in _WORDS.unpack(key):
        subject = _mixed(subject, word)
    return subject


def absence_slot(subject: int) -> bytes:
    """Key of a hash in the map ``absences``."""
    return (subject >> 2 & (ABSENCE_SLOTS - 1)).to_bytes(4, sys.byteorder)


def absence_reason(value: bytes, subject: int) -> str | None:
    """The reason in a slot of ``absences``, if it is that subject's."""
    absence: int = _WORD.unpack(value)[0]
    return None if (absence ^ subject) >> 2 else ABSENCES.get(absence & ABSENCE_REASON)


def older_key(subject: int) -> bytes:
    """Key of a hash in the map ``older``."""
    return _WORD.pack(subject)


def share(size: int, percent: int) -> int:
    """How many entries of a table of that size may be one user's."""
    return max(1, size * percent // 100)


def _mixed(subject: int, word: int) -> int:
    subject = (subject ^ word) * 0x9E3779B97F4A7C15 & _WORD_MASK
    return subject ^ subject >> 32


class Ends(NamedTuple):
    """What has become of the ends of a connection that has a record."""

    gone: int
    """How many of them nobody can ask from any more."""
    closed_with_descriptor: bool
    """The server's socket is in TCP_CLOSE, and its owner can still ask; sock_diag does not list
    it any more."""
    closed_in_queue: bool
    """Likewise, and nobody had accepted it then. Should nobody ever, no event tells."""
    server_gone: bool
    """The server's socket was closed, or disconnected and may be another connection's by now."""
    client_closed_with_descriptor: bool
    """The client's socket is in TCP_CLOSE, and its owner could still ask then."""
    left: bool
    """The client went first, and the record is charged to the pair of users."""


class Holdings(NamedTuple):
    """``struct user``: how many entries of the tables one user has."""

    pending: int
    connections: int
    """Whose client it is, without those that it has left."""
    resets: int
    """Listeners of it that are in ``reset_in_queue``."""


class Connection(NamedTuple):
    """``struct connection``: one established connection, keyed by its server socket's cookie."""

    tuple: Tuple
    server_socket_cookie: int
    client_socket_cookie: int
    listener_socket_cookie: int
    """0 where the listener is older than the capture: then `listener` is None."""
    established_time_ns: int
    client: Credentials
    listener: Credentials | None
    acceptor: Credentials | None
    """Of the task that called accept(); None as long as nobody has, or none was seen to."""


def credentials(data: bytes, offset: int) -> Credentials:
    """Decode a ``struct credentials`` that starts at `offset`."""
    return Credentials._make(CREDENTIALS.unpack_from(data, offset))


def ends(data: bytes) -> Ends:
    """Decode what a ``struct connection`` says of its ends."""
    return Ends._make(CONNECTION_ENDS.unpack_from(data, CONNECTION_ENDS_OFFSET))


def acceptor(data: bytes) -> Credentials | None:
    """Decode what a ``struct connection`` says of the task that called accept()."""
    (accepted,) = CONNECTION_ACCEPTED.unpack_from(data, CONNECTION_ACCEPTED_OFFSET)
    return credentials(data, ACCEPTOR_OFFSET) if accepted else None


def is_of(data: bytes, key: bytes) -> bool:
    """Whether a ``struct connection`` is whole, and of that packed ``struct tuple``."""
    return any(data[:8]) and data.startswith(key, CONNECTION_TUPLE_OFFSET)


def connection(data: bytes) -> Connection | None:
    """Decode a ``struct connection``; None while the kernel is still writing it."""
    established, server, client, listener = CONNECTION_HEAD.unpack_from(data)
    if not established:
        return None
    return Connection(
        tuple=Tuple._make(TUPLE.unpack_from(data, CONNECTION_TUPLE_OFFSET)),
        server_socket_cookie=server,
        client_socket_cookie=client,
        listener_socket_cookie=listener,
        established_time_ns=established,
        client=credentials(data, CLIENT_OFFSET),
        listener=credentials(data, LISTENER_OFFSET) if listener else None,
        acceptor=acceptor(data),
    )


Owners: TypeAlias = tuple[int, int | None, int | None]
"""Whose a connection is, effective uids: of its client; of its listener, None where that is older
than the capture; of its acceptor, None as long as nobody has accepted, or none was seen to."""


def owners(data: bytes) -> Owners | None:
    """Decode whose a ``struct connection`` is, with the same work whatever is written there.

    None while the kernel is still writing it.
    """
    established, listener_cookie, accepted, client, listener, acceptor = _OWNERS.unpack_from(data)
    if not established:
        return None
    return client, listener if listener_cookie else None, acceptor if accepted else None
