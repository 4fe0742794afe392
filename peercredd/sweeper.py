"""The short-lived process that removes what no live socket stands behind.

``python -m peercredd.sweeper JSON PID`` with pin_dir, pending_age_seconds and
record_age_seconds; PID goes unread, for a sweep may outlive its parent. Exit status
0: standard output has one JSON object that counts what was done; 1: one line on
standard error says why it could not be.

The kernel side keeps the tables by itself, but some of its events never come: a
client reached ESTABLISHED and its server socket was never born, or a socket closed
where no program was attached. What is in doubt stays, for an entry too many costs
memory and one too few an answer. Two sweepers at once do no harm.

What it removes the kernel still counts against somebody's share of the tables: so it counts
what each user really has, and leaves the difference where the kernel side looks.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from peercredd import lean, namespaces, pins, records, sockdiag
from peercredd.libbpf import Map

Counts = tuple[int, ...]

_SECOND_NS = 1_000_000_000

PENDING_LIMIT_NS = 15 * 60 * _SECOND_NS
"""Age at which a pending connect() goes though its client be alive, or out of reach. SYN
and SYN-ACK are sent again for some two minutes (tcp_syn_retries and tcp_synack_retries
in Documentation/networking/ip-sysctl.rst): no server socket is born so late."""


class Tables(NamedTuple):
    """The maps that a sweep reads and writes."""

    pending: Map
    connections: Map
    by_tuple: Map
    by_client: Map
    reset_in_queue: Map
    absences: Map
    users: Map
    users_over: Map
    left: Map
    left_over: Map


class Entry(NamedTuple):
    """An entry of ``pending`` or ``connections``, as far as a sweep is concerned."""

    key: bytes
    value: bytes
    """Of a record without its credentials."""
    tuple: bytes
    age_ns: int
    netns_cookie: int
    sockets: frozenset[int]
    """Cookies; while one of these is alive the entry stays."""


def main(arguments: list[str]) -> int:
    """Sweep once; returns the exit status."""
    settings = json.loads(arguments[0])
    maps = Path(settings["pin_dir"]) / pins.CAPTURE / pins.MAPS
    try:
        done = sweep(
            Tables(*(Map.open(maps / name, writable=True) for name in Tables._fields)),
            settings["pending_age_seconds"] * _SECOND_NS,
            settings["record_age_seconds"] * _SECOND_NS,
        )
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        return 1
    print(json.dumps(done))
    return 0


def sweep(tables: Tables, pending_age_ns: int, record_age_ns: int) -> dict[str, int]:
    """Remove what is stale, and mend an index that lost a live connection.

    Args:
        tables: opened for writing.
        pending_age_ns: younger entries of ``pending`` are let be.
        record_age_ns: younger records are let be.

    Returns:
        How many entries were removed or mended, by kind.

    Raises:
        OSError: a table cannot be read or written, or live sockets not be listed.
    """
    # Indexes first: the kernel makes a record before what points to it, so what
    # points to none that is read later is stale.
    by_tuple, by_client = dict(tables.by_tuple.items()), dict(tables.by_client.items())
    connections = {entry.key: entry for entry in _connections(tables)}
    pending = [entry for entry in _pending(tables) if entry.age_ns > pending_age_ns]

    overdue = [entry for entry in pending if entry.age_ns > PENDING_LIMIT_NS]
    lost = _dead([entry for entry in pending if entry.age_ns <= PENDING_LIMIT_NS])
    aged = [entry for entry in connections.values() if entry.age_ns > record_age_ns]
    listeners = set(tables.reset_in_queue.keys())
    forgotten = [entry for entry in aged if _is_forgotten_in_queue(entry.value, listeners)]
    dead = _dead([entry for entry in aged if not _is_out_of_sight(entry.value)])
    dangling = [
        (index, key, cookie)
        for index, pointers in ((tables.by_tuple, by_tuple), (tables.by_client, by_client))
        for key, cookie in pointers.items()
        if cookie not in connections
    ]
    unindexed = [entry for entry in connections.values() if entry.tuple not in by_tuple]
    done = {
        "pending_removed": sum(
            _remove(tables.pending, entry.key, entry.value) for entry in overdue + lost
        ),
        "records_removed": sum(_retire(tables, entry) for entry in forgotten + dead),
        "pointers_removed": sum(
            tables.connections.lookup(cookie) is None and _remove(index, key, cookie)
            for index, key, cookie in dangling
        ),
        "pointers_mended": _mend(tables, unindexed),
    }
    _recount(tables)
    return done


def _pending(tables: Tables) -> Iterator[Entry]:
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    for key, value in tables.pending.items():
        published_ns, client, *_ = records.PENDING_HEAD.unpack_from(value)
        netns_cookie, *_ = records.TUPLE.unpack(key)
        yield Entry(key, value, key, now_ns - published_ns, netns_cookie, frozenset((client,)))


def _connections(tables: Tables) -> Iterator[Entry]:
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    for key, record in tables.connections.items():
        established_ns, server, client, _ = records.CONNECTION_HEAD.unpack_from(record)
        if not established_ns:  # it is being written
            continue
        value = record[: records.CLIENT_OFFSET]
        addresses = value[records.CONNECTION_TUPLE_OFFSET : records.CONNECTION_ENDS_OFFSET]
        netns_cookie, *_ = records.TUPLE.unpack(addresses)
        server_gone = records.ends(record).server_gone
        sockets = frozenset((client,) if server_gone else (client, server))
        yield Entry(key, value, addresses, now_ns - established_ns, netns_cookie, sockets)


def _dead(entries: list[Entry]) -> list[Entry]:
    """Find those whose sockets are gone, all of them, as two looks agree."""
    for _ in range(2):
        live = _live_sockets({entry.netns_cookie for entry in entries})
        entries = [
            entry
            for entry in entries
            if entry.netns_cookie in live and live[entry.netns_cookie].isdisjoint(entry.sockets)
        ]
    return entries


def _live_sockets(wanted: set[int]) -> dict[int, set[int]]:
    """Cookies of the live sockets, by network namespace; without those out of reach."""
    live: dict[int, set[int]] = {}
    for namespace in namespaces.reachable():
        if len(live) == len(wanted):
            break
        with namespaces.entered(namespace) as netns_cookie:
            if netns_cookie in wanted:
                live[netns_cookie] = {each.cookie for each in sockdiag.sockets()}
    return live


def _remove(table: Map, key: bytes, stale: bytes) -> bool:
    """Remove an entry if it still has the stale value."""
    if table.lookup(key) != stale:
        return False
    taken = table.take(key)
    if taken is not None and taken != stale:
        # The kernel wrote anew in between. If it has yet again, that is newer.
        table.update(key, taken, exclusive=True)
    return taken == stale


def _retire(tables: Tables, entry: Entry) -> bool:
    """Remove a record and what points to it, as forget() in bpf/core.h does.

    Not one that has changed meanwhile: a socket of it may have gone out of sight.
    """
    record = tables.connections.lookup(entry.key)
    if record is None or not record.startswith(entry.value):
        return False
    _, server, client, _ = records.CONNECTION_HEAD.unpack_from(record)
    for subject in (records.hash_of_cookie(server), records.hash_of_tuple(entry.tuple)):
        absence = subject & ~records.ABSENCE_REASON | records.ABSENT_RETIRED
        tables.absences.update(records.absence_slot(subject), _u64(absence))
    _remove(tables.by_tuple, entry.tuple, entry.key)
    _remove(tables.by_client, _u64(client), entry.key)
    return tables.connections.delete(entry.key)


def _mend(tables: Tables, unindexed: list[Entry]) -> int:
    """Have ``by_tuple`` point to live connections that it has nothing for.

    While one end of a connection is alive its tuple is taken, so there is no newer
    connection that had it. What was reset in an accept queue has no such end.
    """
    missing = [
        entry
        for entry in unindexed
        if tables.by_tuple.lookup(entry.tuple) is None
        and not records.ends(entry.value).closed_in_queue
    ]
    live = _live_sockets({entry.netns_cookie for entry in missing})
    return sum(
        tables.by_tuple.update(entry.tuple, entry.key, exclusive=True)
        for entry in missing
        if not entry.sockets.isdisjoint(live.get(entry.netns_cookie, ()))
    )


def _recount(tables: Tables) -> None:
    """Write down by how much the kernel counts too much.

    The kernel goes on counting meanwhile. Of two looks the lower figure counts: one that is
    too low is mended by the next sweep, one too high would give room to who has none.
    """
    first = _overcounts(tables)
    again = _overcounts(tables) if any(first) else first
    layouts = (records.USER, tables.users_over), (records.LEFT, tables.left_over)
    for (layout, table), found, later in zip(layouts, first, again, strict=True):
        wrong = {key: tuple(map(min, found[key], later[key])) for key in found.keys() & later}
        for key, was in list(table.items()):
            if key not in wrong:
                _remove(table, key, was)
        for key, over in wrong.items():
            table.update(key, layout.pack(*over))


def _overcounts(tables: Tables) -> list[dict[bytes, tuple[int, ...]]]:
    """What the kernel counts more than there is: of users, and of pairs of users."""
    counted = (records.USER, tables.users), (records.LEFT, tables.left)
    before = [dict(table.items()) for _, table in counted]
    if not any(any(value) for counts in before for value in counts.values()):
        return [{}, {}]
    return [
        dict(_excess(layout, table, counts, held))
        for (layout, table), counts, held in zip(counted, before, _holdings(tables), strict=True)
    ]


def _excess(
    layout: struct.Struct, table: Map, before: dict[bytes, bytes], held: dict[bytes, Counts]
) -> Iterator[tuple[bytes, Counts]]:
    for key, value in before.items():
        counts = layout.unpack(value)
        now = layout.unpack(table.lookup(key) or value)
        true = held.get(key, (0,) * len(counts))
        over = tuple(
            max(0, min(was, is_now) - there)
            for was, is_now, there in zip(counts, now, true, strict=True)
        )
        if any(over):
            yield key, over


def _holdings(tables: Tables) -> tuple[dict[bytes, Counts], dict[bytes, Counts]]:
    """What users, and pairs of users, have in the tables, as the kernel side charges it."""
    established: Counter[bytes] = Counter()
    left: Counter[bytes] = Counter()
    for record in (value for _, value in tables.connections.items()):
        client = _charged_uid(record, records.CLIENT_OFFSET)
        if records.ends(record).left:
            left[client + _charged_uid(record, records.LISTENER_OFFSET)] += 1
        elif any(record[:8]):  # else it is being written
            established[client] += 1
    pending = Counter(
        _charged_uid(value, records.PENDING_HEAD.size) for _, value in tables.pending.items()
    )
    resets = Counter(uid for _, uid in tables.reset_in_queue.items())
    users = {
        uid: records.Holdings(pending[uid], established[uid], resets[uid])
        for uid in {*pending, *established, *resets}
    }
    return dict(users), {pair: (count,) for pair, count in left.items()}


def _charged_uid(value: bytes, credentials: int) -> bytes:
    start = credentials + records.CHARGED_UID_OFFSET
    return value[start : start + records.UID.size]


def _is_out_of_sight(record: bytes) -> bool:
    """Whether a socket that sock_diag does not list may have an owner who can ask."""
    ends = records.ends(record)
    if ends.client_closed_with_descriptor and not _client_is_gone(ends):
        return True
    return not ends.server_gone and (ends.closed_in_queue or ends.closed_with_descriptor)


def _is_forgotten_in_queue(record: bytes, listeners: set[bytes]) -> bool:
    """Whether a server socket was reset in the accept queue of a listener that is gone.

    If somebody accepted it before, and still has it, nothing that the kernel tells would
    show that: this gives up an answer about a dead connection, lest the table fill up.
    """
    ends = records.ends(record)
    *_, listener = records.CONNECTION_HEAD.unpack_from(record)
    return (
        ends.closed_in_queue
        and not ends.server_gone
        and _client_is_gone(ends)
        and listener != 0  # one older than the capture has no entry to go by
        and _u64(listener) not in listeners
    )


def _client_is_gone(ends: records.Ends) -> bool:
    return ends.gone > ends.server_gone


def _u64(number: int) -> bytes:
    return number.to_bytes(8, sys.byteorder)


if __name__ == "__main__":
    lean.leave_out()
    sys.exit(main(sys.argv[1:]))
