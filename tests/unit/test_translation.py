from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import cast

import pytest
from google.rpc import code_pb2
from hypothesis import given
from hypothesis import strategies as st

from harness.memory_view import MemoryView, connection, credentials
from peercred.v1 import peer_credentials_pb2 as pb
from peercredd.processes import NamespaceUnknown, Processes, T, start_of_first
from peercredd.records import HAS_PID_NAMESPACE, HAS_START_TIME, MAX_PID_LEVELS, Credentials
from peercredd.service import PeerCredentialsService, RequestError
from peercredd.translation import (
    INITIAL_PID_NAMESPACE,
    INITIAL_USER_NAMESPACE,
    IdMap,
    PidNamespace,
    UserNamespace,
    Viewpoint,
)

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
OVERFLOW = 65534
INSIDE = 4026532001
AROUND = 4026532000


class Found(Processes):
    """Finds in every namespace what a test has put there."""

    def __init__(self, found: object) -> None:
        super().__init__()
        self.found = found

    def find(self, field: str, namespace: int, read: Callable[[int], T | None]) -> T:
        return cast(T, self.found)


def nested(*pids: tuple[int, int], level: int | None = None) -> Credentials:
    """A process of these numbers in these namespaces, from the outermost on."""
    flat = [number for pair in pids for number in pair]
    return credentials()._replace(
        pid_level=len(pids) if level is None else level,
        pids=struct.pack(f"{2 * MAX_PID_LEVELS}I", *(flat + [0] * 12)[: 2 * MAX_PID_LEVELS]),
    )


def pid(record: Credentials, namespace: int = INSIDE, start_tick: int = 0) -> int | None:
    return PidNamespace(namespace, Found(start_tick)).pid(record)


def extents(*rows: tuple[int, int, int]) -> IdMap:
    """As the kernel writes them: inside, outside, length."""
    return IdMap("".join(f"{a:10} {b:10} {c:10}\n" for a, b, c in rows), OVERFLOW)


def test_an_id_has_the_number_that_its_extent_gives_it() -> None:
    id_map = extents((0, 100_000, 1), (1000, 5, 2), (10, 200, 3))

    assert [id_map.shown(id_) for id_ in (100_000, 5, 6, 200, 202)] == [0, 1000, 1001, 10, 12]
    assert [id_map.number(id_) for id_ in (4, 7, 199, 203, 99_999, 100_001)] == [None] * 6
    assert id_map.shown(7) == OVERFLOW


def test_a_map_that_nobody_has_written_yet_has_no_number_for_anybody() -> None:
    assert extents().number(0) is None
    assert extents().shown(0) == OVERFLOW


def test_the_largest_ids_are_mapped_without_wrapping_round() -> None:
    id_map = extents((2**32 - 3, 0, 2), (0, 2**32 - 3, 2))

    assert [id_map.shown(id_) for id_ in (0, 1, 2)] == [2**32 - 3, 2**32 - 2, OVERFLOW]
    assert [id_map.shown(id_) for id_ in (2**32 - 3, 2**32 - 2, 2**32 - 1)] == [0, 1, OVERFLOW]


@given(
    gaps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=40),
    shuffle=st.randoms(use_true_random=False),
    asked=st.integers(0, 300),
)
def test_any_map_is_followed_extent_by_extent(
    gaps: list[tuple[int, int]], shuffle: Random, asked: int
) -> None:
    rows, outside = [], 0
    for gap, length in gaps:
        rows.append((1000 + 7 * outside, outside + gap, length))
        outside += gap + length
    shuffle.shuffle(rows)

    by_hand = [a + asked - b for a, b, c in rows if b <= asked < b + c]

    assert extents(*rows).shown(asked) == (by_hand or [OVERFLOW])[0]


def test_a_pid_is_that_of_the_namespace_at_whatever_level() -> None:
    record = nested((31, AROUND), (7, INSIDE), (1, 99))

    assert [pid(record, each) for each in (AROUND, INSIDE, 99)] == [31, 7, 1]


def test_a_process_that_is_not_in_the_namespace_has_pid_0() -> None:
    assert pid(nested()) == 0
    assert pid(nested((31, AROUND))) == 0


def test_what_stands_behind_the_recorded_levels_is_not_read() -> None:
    assert pid(nested((31, AROUND), (7, INSIDE), level=1)) == 0


def test_a_namespace_deeper_than_what_is_recorded_has_no_pid_rather_than_0() -> None:
    levels = [(100 + level, 5000 + level) for level in range(MAX_PID_LEVELS)]

    assert pid(nested(*levels)) == 0
    assert pid(nested(*levels, level=MAX_PID_LEVELS + 1)) is None
    assert pid(nested(*levels, level=MAX_PID_LEVELS + 1), namespace=5003) == 103


def test_a_kernel_that_gives_no_pid_namespaces_leaves_the_pid_unknown() -> None:
    record = nested((7, INSIDE))

    assert pid(record._replace(known=record.known & ~HAS_PID_NAMESPACE)) is None


def test_a_namespace_that_began_after_the_credentials_is_another_one() -> None:
    record = nested((7, INSIDE))
    tick = record.time_ns // TICK_NS

    assert pid(record, start_tick=tick - 1) == 7
    assert pid(record, start_tick=tick + 1) == 0


def test_only_its_first_process_tells_when_a_pid_namespace_began() -> None:
    def began(pid: int) -> int | None:
        folder = os.open(f"/proc/{pid}", os.O_PATH)
        try:
            return start_of_first(folder)
        finally:
            os.close(folder)

    assert began(1) == int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19])
    assert began(os.getpid()) is None


def test_within_one_clock_tick_only_a_process_that_still_runs_has_a_pid() -> None:
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    this = nested((7, INSIDE))._replace(
        tgid=os.getpid(), process_start_time_ns=ticks * TICK_NS + 1, time_ns=time.time_ns()
    )
    tick = this.time_ns // TICK_NS

    assert pid(this, start_tick=tick) == 7
    assert pid(this._replace(process_start_time_ns=(ticks + 1) * TICK_NS), start_tick=tick) == 0
    assert pid(this._replace(known=this.known & ~HAS_START_TIME), start_tick=tick) == 0
    assert pid(this._replace(tgid=2**22 + 1), start_tick=tick) == 0


def test_every_user_and_group_id_is_translated_and_nothing_else() -> None:
    message = pb.Credentials(
        uid=1,
        real_uid=2,
        saved_uid=3,
        filesystem_uid=4,
        gid=1,
        real_gid=2,
        saved_gid=3,
        filesystem_gid=9,
        groups=[4, 2, 9],
        group_count=3,
        login_uid=4,
        pid=1,
        tid=2,
        audit_session_id=3,
        effective_capabilities=4,
        user_namespace=1,
        cgroup_id=2,
    )
    maps = ("100 1 4\n", "200 1 4\n")

    UserNamespace(INSIDE, Found(maps)).translate(message)

    assert message == pb.Credentials(
        uid=100,
        real_uid=101,
        saved_uid=102,
        filesystem_uid=103,
        gid=200,
        real_gid=201,
        saved_gid=202,
        filesystem_gid=OVERFLOW,
        groups=[203, 201, OVERFLOW],
        group_count=3,
        login_uid=103,
        pid=1,
        tid=2,
        audit_session_id=3,
        effective_capabilities=4,
        user_namespace=1,
        cgroup_id=2,
    )


@pytest.mark.parametrize("login_uid", [None, 9])
def test_a_login_uid_without_a_number_there_is_absent(login_uid: int | None) -> None:
    message = pb.Credentials(uid=0, login_uid=login_uid)

    UserNamespace(INSIDE, Found(("0 1 4\n", ""))).translate(message)

    assert not message.HasField("login_uid")
    assert message.uid == OVERFLOW


def test_who_accepted_is_told_in_the_same_numbers_as_the_peer() -> None:
    record = connection(10, acceptor_uid=2000)
    response = PeerCredentialsService(MemoryView(record)).lookup(
        pb.LookupRequest(key=pb.ConnectionKey(socket_cookie=10))
    )
    asked = pb.Namespaces(user_namespace=INSIDE)

    viewpoint = Viewpoint(asked, Found(("0 1000 1\n5 2000 1\n", "")))
    viewpoint.translate(response, record.client, record.acceptor)

    assert (response.peer.uid, response.acceptor.uid) == (0, 5)
    assert (response.peer.gid, response.acceptor.gid) == (OVERFLOW, OVERFLOW)
    assert response.namespaces == pb.Namespaces(
        pid_namespace=INITIAL_PID_NAMESPACE, user_namespace=INSIDE
    )


def test_a_process_of_a_namespace_is_found_again_and_its_end_is_noticed() -> None:
    processes, own = Processes(), Path("/proc/self/ns/user").stat().st_ino
    seen: list[str] = []

    def read(folder: int) -> str:
        seen.append(str(Path(f"/proc/self/fd/{folder}").readlink()))
        return "found"

    assert processes.find("user_namespace", own, read) == "found"
    assert processes.find("user_namespace", own, read) == "found"
    assert seen[0] == seen[1]
    with pytest.raises(NamespaceUnknown):
        processes.find("pid_namespace", own, read)
    assert len(seen) == 2


def lookup(request: pb.LookupRequest) -> pb.LookupResponse:
    request.key.socket_cookie = 10
    return PeerCredentialsService(MemoryView(connection(10, acceptor_uid=0))).lookup(request)


@pytest.mark.parametrize(
    "asked",
    [
        pb.Namespaces(),
        pb.Namespaces(pid_namespace=INITIAL_PID_NAMESPACE),
        pb.Namespaces(pid_namespace=INITIAL_PID_NAMESPACE, user_namespace=INITIAL_USER_NAMESPACE),
    ],
    ids=["none", "one", "both"],
)
def test_the_initial_namespaces_are_those_of_the_record_wherever_the_daemon_runs(
    asked: pb.Namespaces,
) -> None:
    plain = lookup(pb.LookupRequest())

    assert lookup(pb.LookupRequest(namespaces=asked)) == plain
    assert plain.namespaces == pb.Namespaces(
        pid_namespace=INITIAL_PID_NAMESPACE, user_namespace=INITIAL_USER_NAMESPACE
    )


def test_an_unknown_namespace_fails_before_anything_is_looked_up() -> None:
    with pytest.raises(RequestError) as raised:
        lookup(pb.LookupRequest(namespaces=pb.Namespaces(user_namespace=3)))

    assert raised.value.status.code == code_pb2.INVALID_ARGUMENT
    assert "namespaces.user_namespace: 3 is no user namespace" in raised.value.status.message
