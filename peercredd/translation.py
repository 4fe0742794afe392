"""Credentials in the numbers of other namespaces than the initial ones.

As cred_to_ucred() and groups_to_user() (net/core/sock.c) give them to a task: translated
when they are asked for, by the namespaces as they are then.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias

from peercred.v1 import peer_credentials_pb2 as pb
from peercredd.records import (
    HAS_PID_NAMESPACE,
    HAS_START_TIME,
    MAX_PID_LEVELS,
    Credentials,
)

INITIAL_PID_NAMESPACE: Final = 0xEFFFFFFC
INITIAL_USER_NAMESPACE: Final = 0xEFFFFFFD
"""PROC_PID_INIT_INO and PROC_USER_INIT_INO (include/linux/proc_ns.h). /proc would tell a daemon
in a container of the container's."""

INITIAL: Final = pb.Namespaces(
    pid_namespace=INITIAL_PID_NAMESPACE, user_namespace=INITIAL_USER_NAMESPACE
)
"""Those of every record. Not to be changed."""

_IdField: TypeAlias = Literal[
    "uid",
    "real_uid",
    "saved_uid",
    "filesystem_uid",
    "gid",
    "real_gid",
    "saved_gid",
    "filesystem_gid",
]

_UID_FIELDS: Final[tuple[_IdField, ...]] = ("uid", "real_uid", "saved_uid", "filesystem_uid")
_GID_FIELDS: Final[tuple[_IdField, ...]] = ("gid", "real_gid", "saved_gid", "filesystem_gid")

_TICK_NS: Final = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class Processes(Protocol):
    """What must be known of the processes in a namespace: see `processes.Processes`."""

    def start_of_pid_namespace(self, namespace: int) -> int:
        """When its first process started, in clock ticks since boot."""

    def maps_of_user_namespace(self, namespace: int) -> tuple[str, str]:
        """Its uid_map and gid_map."""

    def start_of_process(self, pid: int) -> int | None:
        """When a process started, in clock ticks since boot; None if it has ended."""


class IdMap:
    """A uid_map or gid_map, user_namespaces(7), of some namespace, read in the initial one."""

    def __init__(self, text: str, overflow_id: int) -> None:
        rows = (map(int, line.split()) for line in text.splitlines())
        self._extents = sorted((outside, inside, length) for inside, outside, length in rows)
        self._starts = [outside for outside, _, _ in self._extents]
        self._overflow_id = overflow_id

    def number(self, outside: int) -> int | None:
        """The number of an id there, if it has one: from_kuid() of the kernel."""
        if index := bisect_right(self._starts, outside):
            start, inside, length = self._extents[index - 1]
            if outside - start < length:
                return inside + outside - start
        return None

    def shown(self, outside: int) -> int:
        """The number that stands for an id there: from_kuid_munged() of the kernel."""
        number = self.number(outside)
        return self._overflow_id if number is None else number


class PidNamespace:
    """A pid namespace other than the initial one."""

    def __init__(self, inode: int, processes: Processes) -> None:
        self.inode = inode
        self._start_tick = processes.start_of_pid_namespace(inode)
        self._processes = processes

    def pid(self, record: Credentials) -> int | None:
        """The process's number there: 0 if it is not visible, None if that cannot be told."""
        if not record.known & HAS_PID_NAMESPACE:
            return None
        pairs = memoryview(record.pids).cast("I")
        for index in range(0, 2 * min(record.pid_level, MAX_PID_LEVELS), 2):
            if pairs[index + 1] == self.inode:
                return pairs[index] if self._was_there(record) else 0
        return 0 if record.pid_level <= MAX_PID_LEVELS else None

    def _was_there(self, record: Credentials) -> bool:
        """Whether this is the namespace of the record, not a later one of the same inode number."""
        if self._start_tick != record.time_ns // _TICK_NS:
            return self._start_tick < record.time_ns // _TICK_NS
        # As near as clock ticks go. A process that still runs keeps its namespaces.
        start = self._processes.start_of_process(record.tgid)
        known = start is not None and bool(record.known & HAS_START_TIME)
        return known and start == record.process_start_time_ns // _TICK_NS


class UserNamespace:
    """A user namespace other than the initial one."""

    def __init__(self, inode: int, processes: Processes) -> None:
        uids, gids = processes.maps_of_user_namespace(inode)
        self._uids = IdMap(uids, _overflow_id("uid"))
        self._gids = IdMap(gids, _overflow_id("gid"))

    def translate(self, message: pb.Credentials) -> None:
        """Replace the numbers of the initial namespace by those of this one."""
        for fields, ids in ((_UID_FIELDS, self._uids), (_GID_FIELDS, self._gids)):
            for field in fields:
                if message.HasField(field):
                    setattr(message, field, ids.shown(getattr(message, field)))
        message.groups[:] = map(self._gids.shown, message.groups)
        if message.HasField("login_uid"):
            # Without a number it reads (uid_t)-1 there, which is also how "not set" reads.
            number = self._uids.number(message.login_uid)
            if number is None:
                message.ClearField("login_uid")
            else:
                message.login_uid = number


class Viewpoint:
    """The namespaces an answer is for, as they are at the moment; make a new one for each call."""

    def __init__(self, asked: pb.Namespaces, processes: Processes) -> None:
        """Find what translating takes; raises NamespaceUnknown."""
        self._namespaces = pb.Namespaces()
        self._namespaces.CopyFrom(INITIAL)
        self._namespaces.MergeFrom(asked)
        pid_namespace = self._namespaces.pid_namespace
        user_namespace = self._namespaces.user_namespace
        self._pids = self._users = None
        if pid_namespace != INITIAL_PID_NAMESPACE:
            self._pids = PidNamespace(pid_namespace, processes)
        if user_namespace != INITIAL_USER_NAMESPACE:
            self._users = UserNamespace(user_namespace, processes)

    def translate(
        self, response: pb.LookupResponse, peer: Credentials, acceptor: Credentials | None
    ) -> None:
        """Rewrite an answer encoded from these records."""
        response.namespaces.CopyFrom(self._namespaces)
        self._translate(response.peer, peer)
        if acceptor is not None:
            self._translate(response.acceptor, acceptor)

    def _translate(self, message: pb.Credentials, record: Credentials) -> None:
        if self._users:
            self._users.translate(message)
        if self._pids:
            knows_thread = message.HasField("tid")
            message.ClearField("pid")
            message.ClearField("tid")
            pid = self._pids.pid(record)
            if pid is not None:
                message.pid = pid
            # Of a process's threads only the first has a number that is known there: its own.
            if pid and knows_thread and record.tid == record.tgid:
                message.tid = pid


def _overflow_id(kind: str) -> int:
    return int(Path(f"/proc/sys/kernel/overflow{kind}").read_text())
