"""What the BPF programs write down, decoded.

The structs are those of bpf/records.h; ``tests/kernel/test_layout.py`` compares
every offset with what BCC compiled.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

MAX_GROUPS = 32

HAS_NO_NEW_PRIVS = 1 << 0
HAS_LOGIN_UID = 1 << 1
HAS_AUDIT_SESSION_ID = 1 << 2
HAS_CGROUP_ID = 1 << 3
HAS_PID_NAMESPACE = 1 << 4
HAS_USER_NAMESPACE = 1 << 5
HAS_NETWORK_NAMESPACE = 1 << 6
HAS_START_TIME = 1 << 7
HAS_CAPABILITIES = 1 << 8
HAS_GROUPS = 1 << 9
NO_NEW_PRIVS = 1 << 16


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
    euid: int
    egid: int
    suid: int
    sgid: int
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


CREDENTIALS = struct.Struct(f"=4Q17I16s{MAX_GROUPS * 4}s4x")


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


@dataclass(frozen=True, slots=True)
class Connection:
    """``struct connection``: one established connection, keyed by its server socket's cookie."""

    tuple: Tuple
    server_socket_cookie: int
    client_socket_cookie: int
    listener_socket_cookie: int
    """0 where the listener is older than the capture: then `listener` is None."""
    established_time_ns: int
    client: Credentials
    listener: Credentials | None
