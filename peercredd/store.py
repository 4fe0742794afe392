"""Questions asked of the BPF maps: which connection, and who is at its other end."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
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
from peercredd.records import Connection, Credentials, Owners, Tuple
from peercredd.so_peercred import Row

_COOKIE = struct.Struct("=Q")
_NO_COOKIE = bytes(8)
"""No socket has it: sock_gen_cookie() begins at 1."""
_MOST_LOOKUPS = 4
"""As many find something, or find nothing, in one search by tuple; by socket it is fewer."""
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
    NOT_VISIBLE = "NOT_VISIBLE"
    """All of the others, for a caller that may not learn which: see `access`."""


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


class Sighting(NamedTuple):
    """A connection as one of its ends asks for it, and how many map lookups it took."""

    data: bytes | None
    """Its ``struct connection``; None if there is none."""
    asker_is_server: bool
    hits: int
    misses: int
    is_retired: bool = False
    """Without data: the socket that asks was a connection's server, and has been closed."""

    def owners(self) -> Owners | None:
        """Whose it is; None if there is none."""
        return records.owners(self.data) if self.data else None

    def answer(self) -> Answer | Reason:
        """What one who may learn all would be told, but for the reason why there is none."""
        data = self.data
        if not data:
            return Reason.NEVER_SEEN
        established, server, client, listener = records.CONNECTION_HEAD.unpack_from(data)
        if not established:  # the kernel is still writing it
            return Reason.NEVER_SEEN
        if not self.asker_is_server and not listener:
            return Reason.OLDER_THAN_CAPTURE
        return Answer(
            records.credentials(
                data, records.CLIENT_OFFSET if self.asker_is_server else records.LISTENER_OFFSET
            ),
            self.asker_is_server,
            Tuple._make(records.TUPLE.unpack_from(data, records.CONNECTION_TUPLE_OFFSET)),
            server,
            client,
            established,
            records.acceptor(data),
        )


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
    max_entries_per_user: int


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

    def __init__(
        self,
        pin_dir: Path,
        opted_in: Callable[[], Iterable[Row]] = tuple,
        troubles: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """Open the capture in `pin_dir`; after that no privilege is needed any more.

        Args:
            pin_dir: as pinned by the loader.
            opted_in: tells where SO_PEERCRED on TCP is asked for.
            troubles: tells what else is wrong now, for `problems`.

        Raises:
            OSError: there is none, or it may not be opened.
        """
        capture = pin_dir / pins.CAPTURE
        self._opted_in = opted_in
        self._troubles = troubles
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
            # Opened now: later there may be no descriptor left.
            self._statistics = self._open_file(_STATISTICS)
            self._ftrace = self._open_file(_FTRACE)
            self.own_netns_cookie = own_cookie()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all maps and links; the capture goes on as long as it is pinned."""
        self._resources.close()

    def find_by_socket(self, cookie: int) -> Answer | Reason:
        """The peer of the socket with this cookie, which may be either end."""
        sighting = self.sight_by_socket(cookie)
        if sighting.data:
            return sighting.answer()
        if sighting.is_retired:
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
        ends = netns_cookie, local, local_port, remote, remote_port
        sighting = self.sight_by_tuple(*ends)
        if sighting.data:
            return sighting.answer()
        reason = Reason.NEVER_SEEN
        for key in _tuples(*ends):
            reason = self._absence(records.hash_of_tuple(key))
            if reason is not Reason.NEVER_SEEN:
                break
        return reason

    def newest(self, key: bytes) -> bytes | None:
        """The cookie, packed, of the newest server socket that has a packed ``struct tuple``.

        None if there is none.
        """
        return self._by_tuple.lookup(key)

    def record(self, server: bytes, key: bytes) -> bytes | None:
        """The ``struct connection`` of a server socket; None if it is not of that tuple now."""
        data = self._connections.lookup(server)
        return data if data and records.is_of(data, key) else None

    def sight_by_socket(self, cookie: int) -> Sighting:
        """What `find_by_socket` answers from."""
        key = _COOKIE.pack(cookie)
        as_server = self._connections.lookup(key)
        if as_server and not records.ends(as_server).server_gone:
            return Sighting(as_server, True, 1, 0)
        server = self._by_client.lookup(key)
        data = self._connections.lookup(server) if server else None
        hits = sum(value is not None for value in (as_server, server, data))
        if data and records.CONNECTION_HEAD.unpack_from(data)[2] != cookie:
            data = None
        return Sighting(data, False, hits, 2 + (server is not None) - hits, as_server is not None)

    def sight_by_tuple(
        self, netns_cookie: int, local: bytes, local_port: int, remote: bytes, remote_port: int
    ) -> Sighting:
        """What `find_by_tuple` answers from."""
        hits = misses = 0
        keys = _tuples(netns_cookie, local, local_port, remote, remote_port)
        for key, asker_is_server in zip(keys, (True, False), strict=True):
            server = self._by_tuple.lookup(key)
            data = self._connections.lookup(server) if server else None
            found = (server is not None) + (data is not None)
            hits += found
            misses += 1 + (server is not None) - found
            if data and records.is_of(data, key):
                return Sighting(data, asker_is_server, hits, misses)
        return Sighting(None, False, hits, misses)

    def spend(self, sighting: Sighting, present: int) -> None:
        """Make up for what a sighting took less than the longest one that there could be.

        Args:
            sighting: it took so many lookups, and whose it is was decoded if it is anybody's.
            present: cookie of a server socket that has a record.
        """
        data = None
        for _ in range(_MOST_LOOKUPS - sighting.hits):
            data = self._connections.lookup(_COOKIE.pack(present)) or data
        for _ in range(_MOST_LOOKUPS - sighting.misses):
            self._connections.lookup(_NO_COOKIE)
        if data and not sighting.data:
            records.owners(data)

    def pages(self, size: int) -> Iterator[Iterator[Connection]]:
        """All connections that are there throughout, about so many at a time.

        One is decoded when it is its turn, so that who has to wait between pages holds none.
        """
        for page in self._connections.pages(size):
            yield filter(None, map(records.connection, page))

    def has_connection(self, server_cookie: int) -> bool:
        """Whether a server socket has a record."""
        return self._connections.lookup(_COOKIE.pack(server_cookie)) is not None

    def shown(self, connection: Connection) -> Connection:
        """A connection as those may see it who see all: whole."""
        return connection

    def totals(self) -> Totals:
        """How many records there have been since the capture began."""
        counts = map(records.TOTALS.unpack, self._totals.of_each_cpu(bytes(4)))
        return Totals(*map(sum, zip(*counts, strict=True)))

    def events_lost(self) -> int:
        """How many events those who watch were not told of, since the capture began."""
        return self._drop_count(_EVENT_LOST)

    def status(self, *, everything: bool = True) -> StoreStatus:
        """The state of the capture now; counting the tables takes milliseconds.

        Without `everything` it is what tells of nobody who is captured, and takes no time.
        """
        status = StoreStatus(
            hook_set=self._about["hook_set"],
            unused_hook_sets=self._about["unused_hook_sets"],
            cgroup="",
            capture_start_time_ns=self._about["started_ns"],
            tables=(),
            drops=(),
            missing_fields=tuple(self._about["missing_fields"]),
        )
        if not everything:
            return status
        return status._replace(
            cgroup=self._about["cgroup"],
            tables=tuple(
                Table(
                    name,
                    table.count(),
                    table.max_entries,
                    records.share(table.max_entries, self._about["max_percent_per_user"]),
                )
                for name, table in self._tables.items()
            ),
            drops=tuple(
                Drop(name, self._drop_count(index), description)
                for index, (name, description) in enumerate(records.DROPS, 1)
            ),
            so_peercred=tuple(self._opted_in()),
        )

    def is_attached(self) -> bool:
        """Whether every program is in its place at this moment."""
        return bool(self._links) and not self._lost()

    def problems(self) -> list[str]:
        """What keeps answers from being complete now: one line each, with what mends it."""
        by_mend: dict[str, list[str]] = {}
        for program, mend in self._lost().items():
            by_mend.setdefault(mend, []).append(program)
        problems = [
            f"not called: {', '.join(programs)}; {mend}" for mend, programs in by_mend.items()
        ]
        if not self._links:
            problems.append("nothing is attached; restart peercredd")
        return [*problems, *self._troubles()]

    def attachments(self) -> dict[str, Attachment]:
        """Each BPF program, whether it is in its place, and how often it ran."""
        counting, lost = _reads(self._statistics, b"1"), self._lost()
        return {
            name: Attachment(
                name not in lost,
                run_count(program) if counting else None,
                missed_count(program),
            )
            for name, program in self._programs.items()
        }

    def _lost(self) -> dict[str, str]:
        """Programs that the kernel does not call, or in vain, and what mends it."""
        gone = f"somebody detached them, or {self._about['cgroup']} was removed: restart peercredd"
        mend_of_traced = None
        if self._traced and not self._cgroup_is_there():
            mend_of_traced = gone
        elif _reads(self._ftrace, b"0"):
            mend_of_traced = "sysctl kernel.ftrace_enabled=1"
        lost = {name: gone for name, link in self._links.items() if link_cgroup_id(link) == 0}
        if mend_of_traced:
            # Their links stay, whatever becomes of the cgroup.
            lost.update((name, mend_of_traced) for name in self._links if name in self._traced)
        return lost

    def _cgroup_is_there(self) -> bool:
        try:
            return Path(self._about["cgroup"]).stat().st_ino == int(self._about["cgroup_id"])
        except FileNotFoundError:
            return False

    def _hold(self, descriptor: int) -> int:
        self._resources.callback(os.close, descriptor)
        return descriptor

    def _open(self, capture: Path, name: str) -> Map:
        opened = Map.open(capture / pins.MAPS / name)
        self._resources.callback(opened.close)
        return opened

    def _open_file(self, path: Path) -> int | None:
        """A descriptor; None if there is no such file."""
        with suppress(FileNotFoundError):
            return self._hold(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
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


def _tuples(
    netns_cookie: int, local: bytes, local_port: int, remote: bytes, remote_port: int
) -> tuple[bytes, bytes]:
    """The packed ``struct tuple`` with the asking end as the server, and as the client."""
    pack = records.TUPLE.pack
    return (
        pack(netns_cookie, remote, local, remote_port, local_port),
        pack(netns_cookie, local, remote, local_port, remote_port),
    )


def _reads(descriptor: int | None, value: bytes) -> bool:
    """Whether a sysctl has that value; one that this kernel lacks has none."""
    return descriptor is not None and os.pread(descriptor, 64, 0).strip() == value
