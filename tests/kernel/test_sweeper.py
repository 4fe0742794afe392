"""The sweeper on tables of a test's own, that no BPF program writes to meanwhile."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest

from harness import bpf_maps
from harness.netns import NetworkNamespace
from peercredd import libbpf, namespaces, pins, records, sockdiag, sweeper
from peercredd.libbpf import Map

pytestmark = pytest.mark.kernel

SECOND = 1_000_000_000
PENDING_AGE, RECORD_AGE = 120, 300
YOUNG, AGED, OVERDUE = 60, 400, 16 * 60
LATER = 3600
"""By how many seconds the sweeper's clock is ahead of this process's: nothing can be older
than the boot, and the machine may have come up a minute ago."""
LONG_GONE = count(1 << 62)
"""Cookies that no socket has; the kernel counts from 1."""
UNREACHABLE = 1 << 62
NOTHING = {
    "pending_removed": 0,
    "records_removed": 0,
    "pointers_removed": 0,
    "pointers_mended": 0,
}

NOTHING_HAPPENED = records.Ends(
    gone=0,
    closed_with_descriptor=False,
    closed_in_queue=False,
    server_gone=False,
    client_closed_with_descriptor=False,
    left=False,
)
CLOSED = NOTHING_HAPPENED._replace(closed_with_descriptor=True)
RESET_IN_QUEUE = NOTHING_HAPPENED._replace(gone=1, closed_in_queue=True)
LISTENER = 1 << 61
CLIENT, SERVER = 61001, 61002
"""Who pays."""


class Ends(NamedTuple):
    """Both ends of a connection, as their cookies."""

    client: int
    server: int


class Capture:
    """A pin directory with empty tables."""

    def __init__(self, pin_dir: Path) -> None:
        self.pin_dir = pin_dir
        maps = pin_dir / pins.CAPTURE / pins.MAPS
        maps.mkdir(parents=True)
        sizes = {
            "pending": (records.TUPLE.size, records.PENDING_SIZE),
            "connections": (8, records.CONNECTION_SIZE),
            "by_tuple": (records.TUPLE.size, 8),
            "by_client": (8, 8),
            "reset_in_queue": (8, 4),
            "users": (4, records.USER.size),
            "users_over": (4, records.USER.size),
            "left": (8, records.LEFT.size),
            "left_over": (8, records.LEFT.size),
        }
        made = {name: bpf_maps.create(bpf_maps.HASH, *size, 4096) for name, size in sizes.items()}
        made["absences"] = bpf_maps.create(bpf_maps.ARRAY, 4, 8, records.ABSENCE_SLOTS)
        for name, table in made.items():
            libbpf.pin(table.file_descriptor, maps / name)
        self.tables = sweeper.Tables(**made)
        self._port = count(1)
        self.own_netns_cookie = namespaces.own_cookie()

    def tuple(self, netns_cookie: int | None = None) -> bytes:
        """Another one each time."""
        loopback = records.V4_MAPPED + socket.inet_aton("127.0.0.1")
        where = self.own_netns_cookie if netns_cookie is None else netns_cookie
        return records.TUPLE.pack(where, loopback, loopback, next(self._port), 80)

    def connect(self, client: int, age: int, key: bytes | None = None) -> bytes:
        """What publish() in bpf/core.h writes; returns its key."""
        key = self.tuple() if key is None else key
        head = records.PENDING_HEAD.pack(ago(age), client, 0, 0)
        self.tables.pending.update(key, head + credentials(CLIENT))
        return key

    def establish(
        self,
        ends: Ends,
        age: int,
        key: bytes | None = None,
        happened: records.Ends = NOTHING_HAPPENED,
        listener: int = 0,
        complete: bool = True,
    ) -> bytes:
        """What establish() in bpf/core.h writes; returns the tuple."""
        key = self.tuple() if key is None else key
        established = ago(age) if complete else 0
        record = records.CONNECTION_HEAD.pack(established, ends.server, ends.client, listener)
        record += key + records.CONNECTION_ENDS.pack(*happened)
        record = record.ljust(records.CLIENT_OFFSET, b"\1")
        record += credentials(CLIENT) + credentials(SERVER) + credentials(SERVER)
        server = u64(ends.server)
        self.tables.connections.update(server, record)
        self.tables.by_client.update(u64(ends.client), server)
        self.tables.by_tuple.update(key, server)
        return key

    def is_recorded(self, ends: Ends, key: bytes) -> bool:
        """True with all that points to the record, False without any; else it fails."""
        server = u64(ends.server)
        found = {
            self.tables.connections.lookup(server) is not None,
            self.tables.by_client.lookup(u64(ends.client)) == server,
            self.tables.by_tuple.lookup(key) == server,
        }
        (recorded,) = found
        return recorded

    def absence(self, subject: int) -> str | None:
        value = self.tables.absences.lookup(records.absence_slot(subject))
        assert value is not None
        return records.absence_reason(value, subject)

    def start(self) -> subprocess.Popen[str]:
        arguments = {
            "pin_dir": str(self.pin_dir),
            "pending_age_seconds": PENDING_AGE,
            "record_age_seconds": RECORD_AGE,
        }
        return subprocess.Popen(
            [
                *("unshare", "--time", f"--boottime={LATER}", "--fork", "--"),
                *(sys.executable, "-P", "-m", "peercredd.sweeper", json.dumps(arguments)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def sweep(self) -> dict[str, int]:
        """Run the sweeper; returns what it did, without what it did not."""
        output, errors = self.start().communicate()
        assert errors == ""
        done: dict[str, int] = json.loads(output)
        assert done.keys() == NOTHING.keys()
        return {name: number for name, number in done.items() if number}

    def close(self) -> None:
        for table in self.tables:
            table.close()


def credentials(uid: int) -> bytes:
    """Of a task that is charged to that user."""
    return records.UID.pack(uid).rjust(records.CREDENTIALS.size - 4, b"\1") + bytes(4)


def u64(number: int) -> bytes:
    return number.to_bytes(8, sys.byteorder)


def ago(seconds: int) -> int:
    """When that was, by the sweeper's clock."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) + (LATER - seconds) * SECOND


def cookie(sock: socket.socket) -> int:
    so_cookie = 57
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, so_cookie, 8), sys.byteorder)


def connected(stack: ExitStack) -> Ends:
    """Two live sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = stack.enter_context(socket.create_connection(listener.getsockname()))
        server = stack.enter_context(listener.accept()[0])
    return Ends(cookie(client), cookie(server))


def gone() -> Ends:
    return Ends(next(LONG_GONE), next(LONG_GONE))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def capture(tmp_path: Path) -> Iterator[Capture]:
    mount = tmp_path / "bpf"
    mount.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", mount], check=True)
    try:
        capture = Capture(mount / "pins")
        yield capture
        capture.close()
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.fixture
def live(stack: ExitStack) -> Ends:
    return connected(stack)


def test_a_record_stays_while_both_ends_are_alive(capture: Capture, live: Ends) -> None:
    key = capture.establish(live, AGED)
    assert capture.sweep() == {}
    assert capture.is_recorded(live, key)


def test_a_record_stays_while_one_end_is_alive(
    capture: Capture, live: Ends, stack: ExitStack
) -> None:
    other = connected(stack)
    mixed = [Ends(live.client, gone().server), Ends(gone().client, other.server)]
    keys = [capture.establish(ends, AGED) for ends in mixed]
    assert capture.sweep() == {}
    assert all(map(capture.is_recorded, mixed, keys))


def test_a_record_goes_with_all_that_points_to_it(capture: Capture) -> None:
    ends = gone()
    key = capture.establish(ends, AGED)
    assert capture.sweep() == {"records_removed": 1}
    assert not capture.is_recorded(ends, key)


def test_records_that_went_are_known_as_retired(capture: Capture) -> None:
    ended = [gone() for _ in range(8)]
    keys = [capture.establish(ends, AGED) for ends in ended]
    capture.sweep()
    for ends, key in zip(ended, keys, strict=True):
        assert capture.absence(records.hash_of_cookie(ends.server)) == "RETIRED"
        assert capture.absence(records.hash_of_tuple(key)) == "RETIRED"


def test_a_young_record_stays(capture: Capture) -> None:
    ends = gone()
    key = capture.establish(ends, YOUNG)
    assert capture.sweep() == {}
    assert capture.is_recorded(ends, key)


def test_a_closed_socket_with_a_descriptor_keeps_its_record(capture: Capture) -> None:
    ends = gone()
    key = capture.establish(ends, AGED, happened=CLOSED)
    assert capture.sweep() == {}
    assert capture.is_recorded(ends, key)


@pytest.mark.parametrize("server_gone", [False, True])
def test_a_closed_client_with_a_descriptor_keeps_its_record_until_it_is_gone(
    capture: Capture, server_gone: bool
) -> None:
    kept, left = gone(), gone()
    closed = NOTHING_HAPPENED._replace(
        gone=int(server_gone), server_gone=server_gone, client_closed_with_descriptor=True
    )
    key = capture.establish(kept, AGED, happened=closed)
    capture.establish(left, AGED, happened=closed._replace(gone=closed.gone + 1))
    assert capture.sweep() == {"records_removed": 1}
    assert capture.is_recorded(kept, key)


@pytest.mark.parametrize("netns_cookie", [None, UNREACHABLE])
def test_what_was_reset_in_an_accept_queue_stays_as_long_as_its_listener(
    capture: Capture, netns_cookie: int | None
) -> None:
    ends, key = gone(), capture.tuple(netns_cookie)
    capture.tables.reset_in_queue.update(u64(LISTENER), bytes(4))
    capture.establish(ends, AGED, key, happened=RESET_IN_QUEUE, listener=LISTENER)
    assert capture.sweep() == {}
    assert capture.is_recorded(ends, key)
    capture.tables.reset_in_queue.delete(u64(LISTENER))
    assert capture.sweep() == {"records_removed": 1}
    assert not capture.is_recorded(ends, key)


def test_what_was_reset_in_an_accept_queue_stays_while_its_client_can_ask(capture: Capture) -> None:
    ends = gone()
    happened = RESET_IN_QUEUE._replace(gone=0, client_closed_with_descriptor=True)
    key = capture.establish(ends, AGED, happened=happened, listener=LISTENER)
    assert capture.sweep() == {}
    assert capture.is_recorded(ends, key)


def test_what_was_reset_in_the_queue_of_a_listener_older_than_the_capture_stays(
    capture: Capture,
) -> None:
    ends = gone()
    key = capture.establish(ends, AGED, happened=RESET_IN_QUEUE)
    assert capture.sweep() == {}
    assert capture.is_recorded(ends, key)


@pytest.mark.parametrize("happened", [NOTHING_HAPPENED, CLOSED, RESET_IN_QUEUE])
def test_a_server_that_is_gone_keeps_no_record_by_what_became_of_its_socket(
    capture: Capture, live: Ends, happened: records.Ends
) -> None:
    ends = Ends(gone().client, live.server)
    key = capture.establish(
        ends, AGED, happened=happened._replace(gone=happened.gone + 1, server_gone=True)
    )
    assert capture.sweep() == {"records_removed": 1}
    assert not capture.is_recorded(ends, key)


def test_a_record_closed_while_a_sweep_looks_stays(capture: Capture) -> None:
    ends = gone()
    key = capture.establish(ends, AGED)
    (entry,) = sweeper._connections(capture.tables)
    capture.establish(ends, AGED, key, happened=CLOSED)
    assert not sweeper._retire(capture.tables, entry)
    assert capture.is_recorded(ends, key)


def test_a_record_that_is_being_written_stays(capture: Capture) -> None:
    ends = gone()
    key = capture.establish(ends, AGED, complete=False)
    assert capture.sweep() == {}
    assert capture.is_recorded(ends, key)


def test_a_retired_record_leaves_a_newer_one_of_its_tuple_and_its_client(
    capture: Capture, live: Ends
) -> None:
    # The client's socket was disconnected and used again, with the same port.
    old, new = Ends(live.client, gone().server), live
    key = capture.establish(old, AGED)
    capture.establish(new, YOUNG, key)
    (entry,) = (each for each in sweeper._connections(capture.tables) if old.server in each.sockets)
    assert sweeper._retire(capture.tables, entry)
    assert capture.is_recorded(new, key)


def test_a_pending_connect_stays_while_its_client_is_alive(capture: Capture, live: Ends) -> None:
    key = capture.connect(live.client, AGED)
    assert capture.sweep() == {}
    assert capture.tables.pending.lookup(key)


def test_a_pending_connect_whose_client_is_gone_goes(capture: Capture) -> None:
    key = capture.connect(gone().client, AGED)
    assert capture.sweep() == {"pending_removed": 1}
    assert capture.tables.pending.lookup(key) is None


def test_a_young_pending_connect_stays(capture: Capture) -> None:
    key = capture.connect(gone().client, YOUNG)
    assert capture.sweep() == {}
    assert capture.tables.pending.lookup(key)


def test_a_pending_connect_is_not_kept_for_ever(capture: Capture, live: Ends) -> None:
    capture.connect(live.client, OVERDUE)
    capture.connect(gone().client, OVERDUE, capture.tuple(UNREACHABLE))
    assert capture.sweep() == {"pending_removed": 2}


def test_what_is_in_a_namespace_out_of_reach_stays(capture: Capture) -> None:
    pending = capture.connect(gone().client, AGED, capture.tuple(UNREACHABLE))
    ends = gone()
    key = capture.establish(ends, AGED, capture.tuple(UNREACHABLE))
    assert capture.sweep() == {}
    assert capture.tables.pending.lookup(pending)
    assert capture.is_recorded(ends, key)


def test_each_record_is_judged_in_its_own_namespace(
    capture: Capture, live: Ends, stack: ExitStack
) -> None:
    namespace = stack.enter_context(NetworkNamespace())
    inhabitant = namespace.run(subprocess.Popen, ["sleep", "infinity"])
    stack.callback(inhabitant.wait)
    stack.callback(inhabitant.kill)
    there = namespace.run(namespaces.own_cookie)
    alive, dead = namespace.run(connected, stack), gone()
    alive_key = capture.establish(alive, AGED, capture.tuple(there))
    dead_key = capture.establish(dead, AGED, capture.tuple(there))
    own_key = capture.establish(live, AGED)
    assert capture.sweep() == {"records_removed": 1}
    assert capture.is_recorded(alive, alive_key)
    assert not capture.is_recorded(dead, dead_key)
    assert capture.is_recorded(live, own_key)


def test_pointers_to_no_record_go(capture: Capture, live: Ends) -> None:
    key, nowhere = capture.establish(live, YOUNG), gone()
    dangling = capture.tuple()
    capture.tables.by_tuple.update(dangling, u64(nowhere.server))
    capture.tables.by_client.update(u64(nowhere.client), u64(nowhere.server))
    assert capture.sweep() == {"pointers_removed": 2}
    assert capture.tables.by_tuple.lookup(dangling) is None
    assert capture.tables.by_client.lookup(u64(nowhere.client)) is None
    assert capture.is_recorded(live, key)


def test_a_live_record_gets_its_index_back(capture: Capture, live: Ends) -> None:
    key = capture.establish(live, YOUNG)
    capture.tables.by_tuple.delete(key)
    assert capture.sweep() == {"pointers_mended": 1}
    assert capture.is_recorded(live, key)


@pytest.mark.parametrize("happened", [CLOSED, RESET_IN_QUEUE])
def test_a_record_that_may_not_be_the_newest_of_its_tuple_gets_no_index(
    capture: Capture, happened: records.Ends
) -> None:
    # Its socket is closed, though somebody can ask: a newer one may have come and gone.
    capture.tables.reset_in_queue.update(u64(LISTENER), bytes(4))
    key = capture.establish(gone(), AGED, happened=happened, listener=LISTENER)
    capture.tables.by_tuple.delete(key)
    assert capture.sweep() == {}
    assert capture.tables.by_tuple.lookup(key) is None


def overtaken(table: Map, newer: bytes) -> Map:
    """The same table, where the kernel writes anew as soon as an entry was looked up."""

    class Overtaken(Map):
        def lookup(self, key: bytes) -> bytes | None:
            value = super().lookup(key)
            self.update(key, newer)
            return value

    return Overtaken(table.file_descriptor)


def test_what_the_kernel_writes_while_a_sweep_removes_stays(capture: Capture) -> None:
    table, key = capture.tables.by_tuple, capture.tuple()
    old, new = u64(gone().server), u64(gone().server)
    table.update(key, old)
    assert not sweeper._remove(overtaken(table, new), key, old)
    assert table.lookup(key) == new


def test_what_is_not_stale_is_not_touched(capture: Capture) -> None:
    class Untouchable(Map):
        take = delete = None  # type: ignore[assignment]

    table, key = capture.tables.by_tuple, capture.tuple()
    table.update(key, u64(1))
    assert not sweeper._remove(Untouchable(table.file_descriptor), key, u64(2))


def test_several_sweepers_at_once_remove_each_thing_once(capture: Capture, live: Ends) -> None:
    keys = [capture.establish(gone(), AGED) for _ in range(500)]
    pending = [capture.connect(gone().client, AGED) for _ in range(500)]
    kept = capture.establish(live, AGED)
    running = [capture.start() for _ in range(4)]
    outputs = [each.communicate() for each in running]
    assert [errors for _, errors in outputs] == [""] * 4
    done = [json.loads(output) for output, _ in outputs]
    assert sum(each["records_removed"] for each in done) == len(keys)
    assert sum(each["pending_removed"] for each in done) == len(pending)
    assert capture.is_recorded(live, kept)
    assert [table.count() for table in capture.tables[:4]] == [0, 1, 1, 1]


def test_nothing_aged_means_no_look_at_sockets(
    capture: Capture, live: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture.establish(live, YOUNG)
    capture.connect(live.client, YOUNG)
    looks: list[str] = []
    sockets = sockdiag.sockets

    def watched() -> Iterator[sockdiag.Socket]:
        looks.append("look")
        return sockets()

    monkeypatch.setattr(sockdiag, "sockets", watched)
    # By this process's clock.
    ages = (PENDING_AGE - LATER) * SECOND, (RECORD_AGE - LATER) * SECOND
    assert sweeper.sweep(capture.tables, *ages) == NOTHING
    assert looks == []
    capture.establish(gone(), AGED)
    sweeper.sweep(capture.tables, *ages)
    assert looks == ["look", "look"]


PAIR = records.PAIR.pack(CLIENT, SERVER)
LEFT = NOTHING_HAPPENED._replace(gone=1, left=True)


def charge(capture: Capture, uid: int, *counts: int) -> None:
    capture.tables.users.update(records.UID.pack(uid), records.USER.pack(*counts))


def charge_pair(capture: Capture, count: int) -> None:
    capture.tables.left.update(PAIR, records.LEFT.pack(count))


def overcounts(capture: Capture) -> dict[int | str, tuple[int, ...]]:
    users = {
        records.UID.unpack(uid)[0]: records.USER.unpack(counts)
        for uid, counts in capture.tables.users_over.items()
    }
    over = capture.tables.left_over.lookup(PAIR)
    return {**users, "pair": records.LEFT.unpack(over)} if over else users


def test_what_is_counted_as_it_is_there_is_let_be(capture: Capture, live: Ends) -> None:
    capture.connect(live.client, YOUNG)
    capture.establish(live, YOUNG)
    capture.establish(gone(), YOUNG, happened=LEFT)
    capture.tables.reset_in_queue.update(u64(LISTENER), records.UID.pack(SERVER))
    charge(capture, CLIENT, 1, 1, 0)
    charge(capture, SERVER, 0, 0, 1)
    charge_pair(capture, 1)
    assert capture.sweep() == {}
    assert overcounts(capture) == {}


def test_what_a_user_does_not_have_any_more_is_written_down(capture: Capture, live: Ends) -> None:
    capture.connect(gone().client, AGED)
    capture.connect(live.client, YOUNG)
    capture.establish(gone(), AGED)
    capture.establish(gone(), AGED, happened=LEFT)
    capture.establish(gone(), YOUNG, happened=LEFT)
    charge(capture, CLIENT, 2, 1, 0)
    charge(capture, SERVER, 0, 0, 4)
    charge_pair(capture, 3)
    assert capture.sweep() == {"pending_removed": 1, "records_removed": 2}
    assert overcounts(capture) == {CLIENT: (1, 1, 0), SERVER: (0, 0, 4), "pair": (2,)}
    assert capture.tables.users.lookup(records.UID.pack(CLIENT)) == records.USER.pack(2, 1, 0)
    assert capture.tables.left.lookup(PAIR) == records.LEFT.pack(3)


def test_what_is_not_counted_too_much_any_more_is_forgotten(capture: Capture) -> None:
    charge(capture, CLIENT, 2, 0, 0)
    charge(capture, SERVER, 0, 1, 0)
    charge_pair(capture, 2)
    capture.sweep()
    charge(capture, CLIENT, 1, 0, 0)
    charge(capture, SERVER, 0, 0, 0)
    charge_pair(capture, 0)
    capture.sweep()
    assert overcounts(capture) == {CLIENT: (1, 0, 0)}


def test_a_count_that_is_too_low_takes_nothing_from_anybody(capture: Capture, live: Ends) -> None:
    capture.establish(live, YOUNG)
    charge(capture, CLIENT, -1, 0, 0)
    capture.sweep()
    assert overcounts(capture) == {}


def test_no_capture_is_one_line_that_says_so(capture: Capture, tmp_path: Path) -> None:
    capture.pin_dir = tmp_path / "bpf" / "elsewhere"
    process = capture.start()
    output, errors = process.communicate()
    assert process.returncode == 1
    assert output == ""
    assert errors.count("\n") == 1
    assert str(capture.pin_dir) in errors
