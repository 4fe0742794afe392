"""One user's records have a bounded share of the tables, whatever that user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

import pytest

from harness import floods, shares, steps
from harness.actors import Actor, Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon, drops, occupancy, open_map
from harness.nesting import SHIFTED, give_subordinate_uids, nest
from harness.routes import V4
from harness.shares import Charged
from harness.stage import Listener, Stage
from harness.steps import Extent
from harness.users import ALICE, BOB, CAROL, DAVE, SERVICE
from peercredd import records
from peercredd.records import Holdings

pytestmark = pytest.mark.kernel

MAX_CONNECTIONS, MAX_PENDING, PERCENT = 32, 16, 25
SHARE, PENDING_SHARE, LEFT_SHARE = 8, 4, 2


class Crowd(NamedTuple):
    """A daemon with little room, and a stage under it."""

    daemon: Daemon
    stage: Stage
    dropped_before: Counter[str]

    def dropped(self) -> dict[str, int]:
        """What this test's connections have lost, by reason."""
        return dict(Counter(drops(self.stage.client)) - self.dropped_before)

    def sweep(self) -> None:
        """Sweep everything, however young."""
        arguments = {
            "pin_dir": str(self.daemon.pin_dir),
            "pending_age_seconds": 0,
            "record_age_seconds": 0,
        }
        command = [sys.executable, "-P", "-m", "peercredd.sweeper", json.dumps(arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def is_answered(self, server: Actor, listener: Listener, client: Actor, uid: int) -> None:
        """A connection of that client's is recorded; it raises AssertionError else."""
        ends = self.stage.connect(client, listener)
        accepted = server(steps.accept, listener.fds)
        assert self.stage.peer(server, accepted)[:2] == (client.pid, uid)
        client(steps.close, ends)
        server(steps.close, accepted)

    def is_refused(self, server: Actor, listener: Listener, client: Actor) -> None:
        """A connection of that client's is not, and both ends learn why."""
        ends = self.stage.connect(client, listener)
        accepted = server(steps.accept, listener.fds)
        assert self.stage.refusal(server, accepted.tcp) == "TABLE_WAS_FULL"
        assert self.stage.refusal(client, ends.tcp) == "TABLE_WAS_FULL"
        client(steps.close, ends)
        server(steps.close, accepted)


@contextmanager
def small_daemon(hook_set: str) -> Iterator[tuple[Daemon, Origin]]:
    with ExitStack() as resources:
        cgroup = resources.enter_context(Cgroup())
        options = (
            f"--max-connections={MAX_CONNECTIONS}",
            f"--max-pending={MAX_PENDING}",
            f"--max-percent-per-user={PERCENT}",
        )
        daemon = resources.enter_context(Daemon(cgroup, hook_set, *options))
        yield daemon, resources.enter_context(Origin(cgroup))


@contextmanager
def crowd_of(daemon: Daemon, origin: Origin) -> Iterator[Crowd]:
    with daemon.client() as client:
        with Stage(origin, client) as stage:
            yield Crowd(daemon, stage, Counter(drops(client)))
        shares.wait_until(daemon, shares.NOTHING)


@pytest.fixture(scope="module")
def small(hook_set: str) -> Iterator[tuple[Daemon, Origin]]:
    """A daemon with little room."""
    with small_daemon(hook_set) as small:
        yield small


@pytest.fixture
def crowd(small: tuple[Daemon, Origin]) -> Iterator[Crowd]:
    with crowd_of(*small) as crowd:
        yield crowd


@pytest.fixture
def own_crowd(hook_set: str) -> Iterator[Crowd]:
    """One whose daemon's counts are the test's to fill."""
    with small_daemon(hook_set) as small, crowd_of(*small) as crowd:
        yield crowd


@pytest.fixture
def outside(crowd: Crowd) -> Iterator[Stage]:
    """Where nobody captures: what connects to there from inside stays pending."""
    with (
        Cgroup() as cgroup,
        Origin(cgroup) as origin,
        Stage(origin, crowd.stage.client, alone=False) as outside,
    ):
        yield outside


@pytest.mark.parametrize("uid", [ALICE, 0])
def test_a_user_over_the_share_loses_its_own_new_records_only(crowd: Crowd, uid: int) -> None:
    stage = crowd.stage
    server, greedy, other = stage.actor(SERVICE), stage.actor(uid), stage.actor(BOB)
    listener = stage.listen(server, V4)
    kept = []
    for _ in range(SHARE):
        stage.connect(greedy, listener)
        kept.append(server(steps.accept, listener.fds))

    crowd.is_refused(server, listener, greedy)
    assert crowd.dropped() == {"USER_OVER_SHARE": 1}
    crowd.is_answered(server, listener, other, BOB)
    for accepted in kept:
        assert stage.peer(server, accepted)[:2] == (greedy.pid, uid)
    assert shares.charged(crowd.daemon) == Charged({uid: Holdings(0, SHARE, 0)}, {})


def test_a_share_has_room_again_when_connections_end(crowd: Crowd) -> None:
    server, client = crowd.stage.actor(SERVICE), crowd.stage.actor(ALICE)
    listener = crowd.stage.listen(server, V4)
    for _ in range(3 * SHARE):
        crowd.is_answered(server, listener, client, ALICE)
    assert crowd.dropped() == {}


def test_connects_under_way_have_a_share_of_their_own(crowd: Crowd, outside: Stage) -> None:
    stage = crowd.stage
    elsewhere = outside.listen(outside.actor(DAVE), V4)
    server, greedy, other = stage.actor(SERVICE), stage.actor(ALICE), stage.actor(BOB)
    listener = stage.listen(server, V4)
    waiting = [stage.connect(greedy, elsewhere) for _ in range(PENDING_SHARE)]

    assert shares.charged(crowd.daemon) == Charged({ALICE: Holdings(PENDING_SHARE, 0, 0)}, {})
    crowd.is_refused(server, listener, greedy)
    assert crowd.dropped() == {"USER_OVER_SHARE": 1}
    crowd.is_answered(server, listener, other, BOB)
    for ends in waiting:
        greedy(steps.write, ends)  # acknowledged, so there is a server socket
        greedy(steps.close, ends)


def test_status_tells_the_share(crowd: Crowd) -> None:
    tables = {table.name: table for table in crowd.stage.client.status().tables}

    assert {name: table.max_entries_per_user for name, table in tables.items()} == {
        "pending": PENDING_SHARE,
        "connections": SHARE,
        "by_tuple": SHARE,
        "by_client": SHARE,
    }


# ---- who pays ----


@pytest.mark.parametrize(
    ("real", "effective", "charged"),
    [(0, 0, 0), (ALICE, ALICE, ALICE), (ALICE, 0, ALICE), (ALICE, BOB, ALICE), (0, ALICE, ALICE)],
)
def test_who_calls_a_setuid_program_pays_for_it_and_whom_a_daemon_acts_for(
    crowd: Crowd, real: int, effective: int, charged: int
) -> None:
    server, client = crowd.stage.actor(SERVICE), crowd.stage.actor()
    listener = crowd.stage.listen(server, V4)
    client(os.setresuid, real, effective, 0)
    crowd.stage.connect(client, listener)
    assert shares.charged(crowd.daemon) == Charged({charged: Holdings(0, 1, 0)}, {})


def test_who_called_connect_pays_for_deferred_fast_open(crowd: Crowd) -> None:
    server, client = crowd.stage.actor(SERVICE), crowd.stage.actor(ALICE)
    listener = crowd.stage.listen(server, V4)
    ends = crowd.stage.connect(client, listener, how=steps.connect_deferred)
    writer = crowd.stage.actor()
    (fd,) = client.give([ends.tcp], to=writer)
    writer(os.write, fd, b"x")
    assert shares.charged(crowd.daemon) == Charged({ALICE: Holdings(0, 1, 0)}, {})


DEEPEST = 33
"""create_user_ns() in the kernel's kernel/user_namespace.c goes no further."""


def subordinate_of_alice(stage: Stage, inside: int) -> Actor:
    """A process of ALICE's with one of her subordinate uids."""
    actor = stage.actor(ALICE)
    give_subordinate_uids(stage.actor(), actor, ALICE)
    actor(steps.become, inside)
    return actor


def test_subordinate_uids_have_one_share_together(crowd: Crowd) -> None:
    stage = crowd.stage
    server = stage.actor(SERVICE)
    listener = stage.listen(server, V4)
    for inside in range(1, SHARE + 1):
        stage.connect(subordinate_of_alice(stage, inside), listener)
        server(steps.accept, listener.fds)

    assert shares.charged(crowd.daemon) == Charged({ALICE: Holdings(0, SHARE, 0)}, {})
    crowd.is_refused(server, listener, subordinate_of_alice(stage, SHARE + 1))
    crowd.is_refused(server, listener, stage.actor(ALICE))
    crowd.is_answered(server, listener, stage.actor(BOB), BOB)


def test_who_made_the_outermost_user_namespace_pays_for_all_below(crowd: Crowd) -> None:
    stage = crowd.stage
    server = stage.actor(SERVICE)
    listener = stage.listen(server, V4)
    client = subordinate_of_alice(stage, 7)
    client(steps.descend, DEEPEST - 1)
    stage.connect(client, listener)
    assert shares.charged(crowd.daemon) == Charged({ALICE: Holdings(0, 1, 0)}, {})


IDENTITY = (Extent(0, 0, 100_000),)
SCATTERED = tuple(Extent(uid, 400_000 + 10 * uid, 1) for uid in range(20))


@pytest.mark.parametrize(
    ("extents", "charged"),
    [(SHIFTED, SHIFTED[0].outside), (SCATTERED, SCATTERED[0].outside), (IDENTITY, 5)],
    ids=["shifted", "scattered", "identity"],
)
def test_a_container_that_root_has_made_pays_with_its_first_uid_unless_that_is_roots(
    crowd: Crowd, extents: tuple[Extent, ...], charged: int
) -> None:
    stage = crowd.stage
    server = stage.actor(SERVICE)
    listener = stage.listen(server, V4)
    client = stage.fork(nest(stage, stage.actor(), extents, extents))
    client(steps.become, 5)
    stage.connect(client, listener)
    assert shares.charged(crowd.daemon) == Charged({charged: Holdings(0, 1, 0)}, {})


# ---- what servers hold ----


def test_what_clients_leave_at_a_server_costs_neither_of_them_elsewhere(crowd: Crowd) -> None:
    stage = crowd.stage
    hoarder, server = stage.actor(BOB), stage.actor(SERVICE)
    client, other = stage.actor(ALICE), stage.actor(CAROL)
    trap, listener = stage.listen(hoarder, V4), stage.listen(server, V4)
    for _ in range(LEFT_SHARE):
        client(steps.close, stage.connect(client, trap))
    kept = [hoarder(steps.accept, trap.fds) for _ in range(LEFT_SHARE)]

    shares.wait_until(crowd.daemon, Charged({}, {(ALICE, BOB): LEFT_SHARE}))
    crowd.is_refused(hoarder, trap, client)
    assert crowd.dropped() == {"USER_OVER_SHARE": 1}
    for accepted in kept:
        assert stage.peer(hoarder, accepted)[:2] == (client.pid, ALICE)
    crowd.is_answered(server, listener, client, ALICE)
    crowd.is_answered(hoarder, trap, other, CAROL)
    crowd.is_answered(server, listener, hoarder, BOB)


def test_who_leaves_connections_when_there_is_no_room_to_count_them_goes_on_to_pay(
    own_crowd: Crowd,
) -> None:
    stage = own_crowd.stage
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    with closing(open_map(own_crowd.daemon, "left", writable=True)) as left:
        for uid in range(left.max_entries):
            left.update(records.PAIR.pack(uid, uid), records.LEFT.pack(0))
    client(steps.close, stage.connect(client, listener))
    shares.wait_until(own_crowd.daemon, Charged({ALICE: Holdings(0, 1, 0)}, {}))


def test_what_a_client_leaves_is_charged_whichever_end_goes_first(crowd: Crowd) -> None:
    stage = crowd.stage
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    server(steps.close, accepted)
    client(steps.wait_until_hung_up, ends.tcp)
    assert shares.charged(crowd.daemon) == Charged({ALICE: Holdings(0, 1, 0)}, {})
    client(steps.close, ends)
    shares.wait_until(crowd.daemon, shares.NOTHING)

    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    client(steps.close, ends)
    shares.wait_until(crowd.daemon, Charged({}, {(ALICE, SERVICE): 1}))
    server(steps.close, accepted)
    shares.wait_until(crowd.daemon, shares.NOTHING)


def test_a_client_that_is_gone_before_its_server_socket_is_born_leaves_it_to_the_server(
    crowd: Crowd,
) -> None:
    stage = crowd.stage
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4, options=(steps.DEFER_ACCEPT,))
    ends = stage.connect(client, listener)
    client(steps.write, ends)
    client(steps.close, ends)
    server(steps.accept, listener.fds)
    shares.wait_until(crowd.daemon, Charged({}, {(ALICE, SERVICE): 1}))


def test_one_users_listeners_with_resets_leave_room_for_those_of_others(crowd: Crowd) -> None:
    stage = crowd.stage
    hoarder, server, client = stage.actor(BOB), stage.actor(SERVICE), stage.actor(ALICE)
    listeners, targets = hoarder(floods.listen, V4, SHARE + 1, 1)
    for listener, target in zip(listeners, targets, strict=True):
        client(floods.connect_and_reset, target, 1)
        hoarder(steps.close, hoarder(floods.accept, listener, 1))
    shares.wait_until(crowd.daemon, Charged({BOB: Holdings(0, 0, SHARE)}, {}))
    assert crowd.dropped() == {"USER_OVER_SHARE": 1}

    own = stage.listen(server, V4)
    ends = stage.connect(client, own)
    client(steps.reset_delivered, ends.tcp)
    crowd.sweep()
    accepted = server(steps.accept, own.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    hoarder(steps.close, listeners)
    shares.wait_until(crowd.daemon, Charged({SERVICE: Holdings(0, 0, 1)}, {(ALICE, SERVICE): 1}))


# ---- what is given back ----


def test_whatever_becomes_of_a_connection_nothing_of_it_stays_charged(
    crowd: Crowd, outside: Stage
) -> None:
    stage = crowd.stage
    stage.place = outside.place = stage.namespace()  # where nobody else listens on a closed port
    elsewhere = outside.listen(outside.actor(DAVE), V4)
    for killed in (False, True):
        server, client = stage.actor(SERVICE), stage.actor(ALICE)
        listener = stage.listen(server, V4)
        closed = stage.listen(server, V4)
        server(steps.close, closed.fds)
        with pytest.raises(ConnectionRefusedError):
            client(floods.connect, closed.addresses.tcp, 1)
        client(floods.connect, listener.addresses.tcp, 1)
        client(floods.connect_and_close, listener.addresses.tcp, 1)
        client(floods.connect_and_reset, listener.addresses.tcp, 1)
        client(floods.start_connecting, elsewhere.addresses.tcp, 1)
        deferred = client(steps.open_socket, V4.client_family, 1, 0)
        client(steps.defer, deferred, listener.addresses.tcp)
        assert shares.charged(crowd.daemon) != shares.NOTHING
        for actor in (client, server):
            actor.kill() if killed else actor.exit()
        crowd.sweep()
        shares.wait_until(crowd.daemon, shares.NOTHING)
    assert occupancy(stage.client)["connections"] == 0


def test_what_is_left_of_an_earlier_connect_of_the_same_tuple_is_given_back(
    crowd: Crowd, outside: Stage
) -> None:
    stage = crowd.stage
    stage.place = outside.place = stage.namespace()  # where nobody else takes a port
    elsewhere = outside.listen(outside.actor(DAVE), V4)
    first, second = stage.actor(ALICE), stage.actor(BOB)
    ends = stage.connect(first, elsewhere)
    local = first(steps.own_name, ends.tcp)
    first(steps.reset, ends.tcp)
    assert shares.charged(crowd.daemon) == Charged({ALICE: Holdings(1, 0, 0)}, {})
    ends = stage.connect(second, elsewhere, local=local)
    assert shares.charged(crowd.daemon) == Charged({BOB: Holdings(1, 0, 0)}, {})
    second(steps.write, ends)
    second(steps.close, ends)


def test_what_the_sweeper_removes_is_given_back(crowd: Crowd) -> None:
    stage = crowd.stage
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4, options=(steps.DEFER_ACCEPT,))
    usual = stage.listen(server, V4)
    for _ in range(3):
        client(floods.connect_and_reset, listener.addresses.tcp, PENDING_SHARE)
        crowd.is_refused(server, usual, client)
        crowd.sweep()
        assert shares.charged(crowd.daemon) == shares.NOTHING
        crowd.is_answered(server, usual, client, ALICE)


def test_who_comes_when_there_is_no_room_to_count_is_answered_all_the_same(
    own_crowd: Crowd,
) -> None:
    stage = own_crowd.stage
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    with closing(open_map(own_crowd.daemon, "users", writable=True)) as users:
        for uid in range(1_000_000, 1_000_000 + users.max_entries):
            users.update(records.UID.pack(uid), records.USER.pack(0, 0, 0))
        assert users.lookup(records.UID.pack(ALICE)) is None
    for _ in range(SHARE + 1):
        stage.connect(client, listener)
        accepted = server(steps.accept, listener.fds)
        assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert shares.charged(own_crowd.daemon) == shares.NOTHING
    assert own_crowd.dropped() == {}


def test_a_count_that_is_too_low_locks_nobody_out(crowd: Crowd) -> None:
    stage = crowd.stage
    server, client = stage.actor(SERVICE), stage.actor(CAROL)
    listener = stage.listen(server, V4)
    with closing(open_map(crowd.daemon, "users", writable=True)) as users:
        users.update(records.UID.pack(CAROL), records.USER.pack(-3, -2, -1))
    crowd.is_answered(server, listener, client, CAROL)
    with closing(open_map(crowd.daemon, "users", writable=True)) as users:
        users.update(records.UID.pack(CAROL), records.USER.pack(0, 0, 0))
