"""Questions asked of the BPF maps: which connection, and who is at its other end."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from peercredd import pins, records
from peercredd.libbpf import (
    KernelError,
    Map,
    get_pinned,
    link_cgroup_id,
    missed_count,
    program_of,
    run_count,
)
from peercredd.namespaces import own_cookie
from peercredd.records import Connection, Credentials, Tuple
from peercredd.so_peercred import Row

_COOKIE = struct.Struct("=Q")
_DROP_COUNT = struct.Struct("=Q")
_STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
_FTRACE = Path("/proc/sys/kernel/ftrace_enabled")
_EVENT_LOST = 1 + [name for name, _ in records.DROPS].index("EVENT_LOST")
_RECORD_TABLES = ("pending", "connections", "by_tuple", "by_client")


class Reason(Enum):
    """Why a connection is not found. The values are the API's ErrorInfo reasons."""

    NEVER_SEEN = "NEVER_SEEN"
    OLDER_THAN_CAPTURE = "OLDER_THAN_CAPTURE"
    TABLE_WAS_FULL = "TABLE_WAS_FULL"
    RETIRED = "RETIRED"
    NOT_LOCAL = "NOT_LOCAL"


class Answer(NamedTuple):
    """The other end of a connection."""

    peer: Credentials
    asker_is_server: bool
    """True: the asking end is the accepted socket, `peer` called connect()."""
    tuple: Tuple
    server_socket_cookie: int
    client_socket_cookie: int
    established_time_ns: int
    acceptor: Credentials | None
    """Of the task that accepted the connection, where that was seen: a fact beside the answer."""


class Attachment(NamedTuple):
    """A BPF program in its place."""

    attached: bool
    run_count: int | None
    """None unless the kernel counts (sysctl kernel.bpf_stats_enabled)."""
    missed_count: int | None
    """Runs that the kernel skipped, because the program was running on that CPU already. None
    where it never does, or does not tell."""


class Table(NamedTuple):
    """A map of the capture, and how full it is."""

    name: str
    entries: int
    max_entries: int


class Drop(NamedTuple):
    """What was not recorded, and how often."""

    reason: str
    occurrences: int
    description: str


class Totals(NamedTuple):
    """Records since the capture began."""

    established: int
    retired: int


class StoreStatus(NamedTuple):
    """What the capture says of itself."""

    hook_set: str
    unused_hook_sets: dict[str, str]
    """Name to the reason why it is not in use, one line."""
    cgroup: str
    capture_start_time_ns: int
    tables: tuple[Table, ...]
    drops: tuple[Drop, ...]
    missing_fields: tuple[str, ...]
    so_peercred: tuple[Row, ...] = ()
    """Where SO_PEERCRED on TCP is asked for, or attached."""


class Store:
    """The pinned maps of a running capture, opened read-only.

    Safe to use from several threads. While it is open the attachments stay,
    even if somebody removes their pins. Every method that asks a map raises
    KernelError where the kernel gives no answer.
    """

    own_netns_cookie: int
    """SO_NETNS_COOKIE of the network namespace that this process is in."""

    def __init__(self, pin_dir: Path, opted_in: Callable[[], Iterable[Row]] = tuple) -> None:
        """Open the capture in `pin_dir`; `opted_in` tells where SO_PEERCRED on TCP is asked for.

        Raises:
            OSError: there is none, or it may not be opened.
        """
        capture = pin_dir / pins.CAPTURE
        self._opted_in = opted_in
        self._resources = ExitStack()
        try:
            self._tables = {name: self._open(capture, name) for name in _RECORD_TABLES}
            self._connections = self._tables["connections"]
            self._by_tuple = self._tables["by_tuple"]
            self._by_client = self._tables["by_client"]
            self._absences = self._open(capture, "absences")
            self._older = self._open(capture, "older")
            self._drops = self._open(capture, "drops")
            self._totals = self._open(capture, "totals")
            self._links = {
                pinned.name: self._hold(get_pinned(pinned))
                for pinned in sorted((capture / pins.LINKS).iterdir())
            }
            self._programs = {
                name: self._hold(program_of(link)) for name, link in self._links.items()
            }
            self._traced = {
                name for name, link in self._links.items() if link_cgroup_id(link) is None
            }
            text = self._open(capture, "about").lookup(bytes(4)) or b""
            self._about = json.loads(text.rstrip(b"\0"))
            self.own_netns_cookie = own_cookie()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all maps and links; the capture goes on as long as it is pinned."""
        self._resources.close()

    def find_by_socket(self, cookie: int) -> Answer | Reason:
        """The peer of the socket with this cookie, which may be either end."""
        key = _COOKIE.pack(cookie)
        as_server = self._connections.lookup(key)
        if as_server and not records.ends(as_server).server_gone:
            return _answer(as_server, asker_is_server=True)
        server = self._by_client.lookup(key)
        if server and (data := self._connections.lookup(server)):
            _, _, client, _ = records.CONNECTION_HEAD.unpack_from(data)
            if client == cookie:
                return _answer(data, asker_is_server=False)
        if as_server:
            return Reason.RETIRED
        return self._absence(records.hash_of_cookie(cookie))

    def find_by_tuple(
        self, netns_cookie: int, local: bytes, local_port: int, remote: bytes, remote_port: int
    ) -> Answer | Reason:
        """The peer in the newest connection that has this tuple.

        Args:
            netns_cookie: of the network namespace that both ends are in.
            local: address of the asking end, 16 bytes, IPv4 as v4-mapped IPv6.
            local_port: of the asking end, host byte order.
            remote: address of the other end.
            remote_port: of the other end.
        """
        pack = records.TUPLE.pack
        as_server = pack(netns_cookie, remote, local, remote_port, local_port)
        as_client = pack(netns_cookie, local, remote, local_port, remote_port)
        for key, asker_is_server in ((as_server, True), (as_client, False)):
            if data := self._newest(key):
                return _answer(data, asker_is_server)
        reason = self._absence(records.hash_of_tuple(as_server))
        if reason is Reason.NEVER_SEEN:
            reason = self._absence(records.hash_of_tuple(as_client))
        return reason

    def server_cookies(self) -> list[int]:
        """The cookies of all server sockets that have a record now."""
        return [_COOKIE.unpack(key)[0] for key in self._connections.keys()]  # noqa: SIM118

    def connection(self, server_cookie: int) -> Connection | None:
        """The record of one server socket, if it has one."""
        data = self._connections.lookup(_COOKIE.pack(server_cookie))
        return records.connection(data) if data else None

    def totals(self) -> Totals:
        """How many records there have been since the capture began."""
        counts = map(records.TOTALS.unpack, self._totals.of_each_cpu(bytes(4)))
        return Totals(*map(sum, zip(*counts, strict=True)))

    def events_lost(self) -> int:
        """How many events those who watch were not told of, since the capture began."""
        return self._drop_count(_EVENT_LOST)

    def status(self) -> StoreStatus:
        """The state of the capture now; counting the tables takes milliseconds."""
        return StoreStatus(
            hook_set=self._about["hook_set"],
            unused_hook_sets=self._about["unused_hook_sets"],
            cgroup=self._about["cgroup"],
            capture_start_time_ns=self._about["started_ns"],
            tables=tuple(
                Table(name, table.count(), table.max_entries)
                for name, table in self._tables.items()
            ),
            drops=tuple(
                Drop(name, self._drop_count(index), description)
                for index, (name, description) in enumerate(records.DROPS, 1)
            ),
            missing_fields=tuple(self._about["missing_fields"]),
            so_peercred=tuple(self._opted_in()),
        )

    def is_attached(self) -> bool:
        """Whether every program is in its place at this moment."""
        return bool(self._links) and all(map(self._is_in_place, self._links))

    def attachments(self) -> dict[str, Attachment]:
        """Each BPF program, whether it is in its place, and how often it ran."""
        counting = _reads(_STATISTICS, "1")
        return {
            name: Attachment(
                self._is_in_place(name),
                run_count(program) if counting else None,
                missed_count(program),
            )
            for name, program in self._programs.items()
        }

    def _is_in_place(self, program: str) -> bool:
        if program in self._traced:
            # Its link stays; but without ftrace the kernel does not call it.
            return not _reads(_FTRACE, "0")
        return link_cgroup_id(self._links[program]) != 0

    def _hold(self, descriptor: int) -> int:
        self._resources.callback(os.close, descriptor)
        return descriptor

    def _open(self, capture: Path, name: str) -> Map:
        opened = Map.open(capture / pins.MAPS / name)
        self._resources.callback(opened.close)
        return opened

    def _newest(self, key: bytes) -> bytes | None:
        """The record that the tuple's index points to, if it is still of that tuple."""
        server = self._by_tuple.lookup(key)
        data = self._connections.lookup(server) if server else None
        start = records.CONNECTION_TUPLE_OFFSET
        if data and data[start : start + records.TUPLE.size] == key and any(data[:8]):
            return data
        return None

    def _absence(self, subject: int) -> Reason:
        slot = self._absences.lookup(records.absence_slot(subject))
        if slot and (reason := records.absence_reason(slot, subject)):
            return Reason(reason)
        if self._older.lookup(records.older_key(subject)):
            return Reason.OLDER_THAN_CAPTURE
        return Reason.NEVER_SEEN

    def _drop_count(self, index: int) -> int:
        value = self._drops.lookup(index.to_bytes(4, sys.byteorder))
        if value is None:
            raise KernelError(0, f"the drop counter {index} is missing from the capture")
        return int(_DROP_COUNT.unpack(value)[0])


def _answer(data: bytes, asker_is_server: bool) -> Answer | Reason:
    established, server, client, listener = records.CONNECTION_HEAD.unpack_from(data)
    if not established:  # the kernel is still writing it
        return Reason.NEVER_SEEN
    if not asker_is_server and not listener:
        return Reason.OLDER_THAN_CAPTURE
    return Answer(
        records.credentials(
            data, records.CLIENT_OFFSET if asker_is_server else records.LISTENER_OFFSET
        ),
        asker_is_server,
        Tuple._make(records.TUPLE.unpack_from(data, records.CONNECTION_TUPLE_OFFSET)),
        server,
        client,
        established,
        records.acceptor(data),
    )


def _reads(path: Path, value: str) -> bool:
    """Whether a sysctl has that value; one that this kernel lacks has none."""
    with suppress(FileNotFoundError):
        return path.read_text().strip() == value
    return False
