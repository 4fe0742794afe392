"""Credentials in the numbers of other namespaces than the initial ones.

As cred_to_ucred() and groups_to_user() (net/core/sock.c) give them to a task: translated
when they are asked for, by the namespaces as they are then.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypeVar

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
_START_TIME: Final = 19
"""Of what follows the name in proc_pid_stat(5), in clock ticks since boot, rounded down."""

_MOST_HINTS: Final = 4096

T = TypeVar("T")


class NamespaceUnknown(ValueError):  # noqa: N818 - named like the reason it becomes
    """A namespace in which there is no process to be seen; `field` is that of Namespaces."""

    def __init__(self, field: str, namespace: int) -> None:
        kind = field.removesuffix("_namespace")
        super().__init__(
            f"{namespace} is no {kind} namespace that peercredd sees a process in; send the inode "
            f"number of /proc/self/ns/{kind}, or leave it out for the initial one"
        )
        self.field = field


class Processes:
    """Finds the processes of a namespace; knows where it found one before, and looks there first.

    A number used again is noticed: what is found is always what is there now.
    """

    def __init__(self) -> None:
        self._hints: dict[int, str] = {}

    def find(self, field: str, namespace: int, read: Callable[[int], T | None]) -> T:
        """What `read` makes of the first process in a namespace that it makes anything of.

        Args:
            field: that of Namespaces.
            namespace: inode number.
            read: is given a descriptor of the process's folder in /proc.

        Raises:
            NamespaceUnknown: there is none.
        """
        link = f"ns/{field.removesuffix('_namespace')}"
        for pid in self._candidates(namespace):
            try:
                # Of a thousand processes one is wanted: pathlib would take twice as long.
                if os.stat(f"/proc/{pid}/{link}").st_ino != namespace:  # noqa: PTH116
                    continue
                # From here on it is one process, whatever its number will be used for.
                folder = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY)
                try:
                    before = os.stat(link, dir_fd=folder).st_ino
                    found = read(folder)
                    # A process can go to a namespace below, and never comes back.
                    after = os.stat(link, dir_fd=folder).st_ino
                finally:
                    os.close(folder)
            except OSError:  # it has ended
                continue
            if found is not None and before == after == namespace:
                if len(self._hints) >= _MOST_HINTS:
                    self._hints.clear()
                self._hints[namespace] = pid
                return found
        raise NamespaceUnknown(field, namespace)

    def _candidates(self, namespace: int) -> Iterator[str]:
        if hint := self._hints.get(namespace):
            yield hint
        yield from filter(str.isdecimal, os.listdir("/proc"))  # noqa: PTH208 - as above


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


def start_of_first(folder: int) -> int | None:
    """When a process started that is the first in its pid namespace; None for any other.

    Args:
        folder: descriptor of its folder in /proc.

    Returns:
        Clock ticks since boot, rounded down.
    """
    for line in _read(folder, "status").splitlines():
        if line.startswith("NSpid:"):
            is_first = line.split()[-1] == "1"
            return _start_tick(_read(folder, "stat")) if is_first else None
    return None


class PidNamespace:
    """A pid namespace other than the initial one."""

    def __init__(self, inode: int, processes: Processes) -> None:
        self.inode = inode
        self._start_tick = processes.find("pid_namespace", inode, start_of_first)

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
        try:
            start = _start_tick(Path(f"/proc/{record.tgid}/stat").read_text(errors="replace"))
        except OSError:
            return False
        known = bool(record.known & HAS_START_TIME)
        return known and start == record.process_start_time_ns // _TICK_NS


class UserNamespace:
    """A user namespace other than the initial one."""

    def __init__(self, inode: int, processes: Processes) -> None:
        uids, gids = processes.find("user_namespace", inode, _maps)
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


def _start_tick(stat: str) -> int:
    return int(stat.rpartition(")")[2].split()[_START_TIME])


def _maps(folder: int) -> tuple[str, str]:
    return _read(folder, "uid_map"), _read(folder, "gid_map")


def _overflow_id(kind: str) -> int:
    return int(Path(f"/proc/sys/kernel/overflow{kind}").read_text())


def _read(folder: int, name: str) -> str:
    with open(
        name, errors="replace", opener=lambda path, flags: os.open(path, flags, dir_fd=folder)
    ) as file:
        return file.read()
