"""One user takes all the room there is, in every way; another one's connections are answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

import peercred
from harness import floods, shares, steps
from harness.actors import Actor, Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon, drops, occupancy, wait_until_empty
from harness.nesting import give_subordinate_uids
from harness.routes import V4
from harness.stage import Listener, Stage
from harness.users import ALICE, BOB, CAROL, SERVICE

pytestmark = pytest.mark.kernel

MAX_CONNECTIONS, MAX_PENDING = 1024, 512
SHARE, PENDING_SHARE = MAX_CONNECTIONS // 4, MAX_PENDING // 4
LEFT_SHARE = SHARE // 4
"""Of connections that one user has left at another's servers."""
FLOOD = 2 * MAX_CONNECTIONS
"""More than there is room for, in any table."""
QUEUE = 4096


class Town:
    """A daemon with modest tables; a service, its neighbour BOB, and ALICE, who means harm."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._dropped_before = Counter(drops(stage.client))
        self.service, self.bob, self.alice = (stage.actor(uid) for uid in (SERVICE, BOB, ALICE))
        self.listener = stage.listen(self.service, V4, QUEUE)

    def trap(self, owner: Actor, backlog: int = QUEUE) -> Listener:
        """A listener that nobody serves."""
        return self.stage.listen(owner, V4, backlog)

    def is_known(self, client: Actor, uid: int) -> bool:
        """Whether the service learns who this client is; else that there was no room for it."""
        ends = self.stage.connect(client, self.listener)
        accepted = self.service(steps.accept, self.listener.fds)
        with self.service.borrow(accepted.tcp) as sock:
            (answer,) = self.stage.client.lookup_many([sock])
        client(steps.close, ends)
        self.service(steps.close, accepted)
        if isinstance(answer, peercred.NotFound):
            assert answer.reason == "TABLE_WAS_FULL"
            return False
        assert isinstance(answer, peercred.PeerCredentials)
        assert (answer.pid, answer.uid) == (client.pid, uid)
        return True

    def assert_only_alice_suffers(self) -> None:
        """Others are known, in whatever number of connections they may have."""
        dropped = Counter(drops(self.stage.client)) - self._dropped_before
        assert dropped.keys() == {"USER_OVER_SHARE"}
        assert self.is_known(self.bob, BOB)
        fds = self.bob(floods.connect, self.listener.addresses.tcp, SHARE)
        accepted = self.service(floods.accept, self.listener.fds.tcp, SHARE)
        for fd in (accepted[0], accepted[-1]):
            assert self.stage.answer(self.service, fd).uid == BOB
        self.bob(steps.close, fds)
        self.service(steps.close, accepted)


@pytest.fixture(scope="module")
def own_cgroup() -> Iterator[Cgroup]:
    with Cgroup() as cgroup:
        yield cgroup


@pytest.fixture(scope="module")
def daemon(own_cgroup: Cgroup, hook_set: str) -> Iterator[Daemon]:
    """One that nobody else's connections are in."""
    with Daemon(
        own_cgroup,
        hook_set,
        f"--max-connections={MAX_CONNECTIONS}",
        f"--max-pending={MAX_PENDING}",
        *("--sweep-interval-seconds", "1"),
        *("--sweep-pending-age-seconds", "1"),
        *("--sweep-record-age-seconds", "1"),
    ) as daemon:
        yield daemon


@pytest.fixture
def town(daemon: Daemon, own_cgroup: Cgroup) -> Iterator[Town]:
    with daemon.client() as client, Origin(own_cgroup) as origin:
        with Stage(origin, client, alone=False) as stage:
            yield Town(stage)
        # What became of the flood only the sweeper may know.
        shares.wait_until(daemon, shares.NOTHING)
        wait_until_empty(client)


def test_a_flood_of_connections_costs_its_user_only(town: Town) -> None:
    trap = town.trap(town.alice)
    town.alice(floods.connect, trap.addresses.tcp, FLOOD)

    assert occupancy(town.stage.client)["connections"] == SHARE
    assert not town.is_known(town.alice, ALICE)
    town.assert_only_alice_suffers()


def test_connections_that_are_closed_and_never_accepted_cost_their_user_only(town: Town) -> None:
    for _ in range(3):
        trap = town.trap(town.alice)
        town.alice(floods.connect_and_close, trap.addresses.tcp, MAX_CONNECTIONS)

    assert occupancy(town.stage.client)["connections"] == LEFT_SHARE
    town.assert_only_alice_suffers()


def test_connections_reset_in_the_queues_of_many_listeners_cost_their_user_only(
    town: Town,
) -> None:
    _, targets = town.alice(floods.listen, V4, 16, QUEUE)
    for target in targets:
        town.alice(floods.connect_and_reset, target, FLOOD // 16)

    assert occupancy(town.stage.client)["connections"] == LEFT_SHARE
    town.assert_only_alice_suffers()


def test_a_flood_of_syns_that_nobody_answers_costs_its_user_only(town: Town) -> None:
    trap = town.trap(town.alice, backlog=0)
    town.alice(floods.connect, trap.addresses.tcp, 1)  # its queue is full now
    town.alice(floods.start_connecting, trap.addresses.tcp, MAX_CONNECTIONS)

    assert occupancy(town.stage.client)["pending"] == PENDING_SHARE
    town.assert_only_alice_suffers()


def test_half_open_connections_by_the_thousand_cost_their_user_only(town: Town) -> None:
    trap = town.stage.listen(town.alice, V4, QUEUE, options=(steps.DEFER_ACCEPT,))
    town.alice(floods.connect, trap.addresses.tcp, FLOOD)

    assert occupancy(town.stage.client)["pending"] == PENDING_SHARE
    town.assert_only_alice_suffers()


def test_a_thousand_subordinate_uids_are_one_user(town: Town) -> None:
    root, alice = town.stage.actor(), town.alice
    trap = town.trap(alice)
    give_subordinate_uids(root, alice, ALICE)
    alice(floods.connect_as_many, trap.addresses.tcp, range(1, 1_001), FLOOD // 1_000)

    assert occupancy(town.stage.client)["connections"] == SHARE
    town.assert_only_alice_suffers()


def test_a_server_that_keeps_what_its_clients_have_closed_cannot_silence_them(town: Town) -> None:
    trap = town.trap(town.alice)
    for _ in range(4):
        town.bob(floods.connect_and_close, trap.addresses.tcp, SHARE)
        assert town.is_known(town.bob, BOB)

    assert occupancy(town.stage.client)["connections"] == LEFT_SHARE
    town.assert_only_alice_suffers()


def test_a_flood_of_a_services_queue_by_one_user_costs_the_service_nothing(town: Town) -> None:
    flooded = town.stage.listen(town.service, V4, QUEUE)
    town.alice(floods.connect_and_close, flooded.addresses.tcp, FLOOD)

    assert occupancy(town.stage.client)["connections"] == LEFT_SHARE
    assert not town.is_known(town.alice, ALICE)
    town.assert_only_alice_suffers()
    assert town.is_known(town.service, SERVICE)
    assert town.is_known(town.stage.actor(CAROL), CAROL)


def test_a_user_whose_flood_has_ended_is_known_again(town: Town) -> None:
    trap = town.trap(town.alice)
    fds = town.alice(floods.connect, trap.addresses.tcp, FLOOD)
    town.alice(steps.close, (*fds, *trap.fds))
    town.stage.wait_until_empty()

    assert town.is_known(town.alice, ALICE)
