"""Whatever two processes do around connect() and listen(), TCP says what AF_UNIX says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import steps
from harness.actors import Actor, Origin
from harness.daemon import Client
from harness.io_uring import Mode
from harness.routes import LOOPBACK
from harness.so_peercred import Peer
from harness.stage import Connect, Stage
from harness.steps import Both, ByRing, Route
from harness.users import ALICE, BOB, CAROL

pytestmark = pytest.mark.kernel

UNCHANGED = -1
LARGEST_ID = 2**32 - 2


@dataclass
class Role:
    """Who plays the client or the server at the moment, and with which sockets."""

    stage: Stage
    actor: Actor
    fds: Both[int] | None = None

    def play(self, deeds: list[Deed]) -> None:
        for deed in deeds:
            deed(self)


Deed = Callable[[Role], None]


@dataclass(frozen=True)
class SetUserIds:
    real: int
    effective: int
    saved: int

    def __call__(self, role: Role) -> None:
        role.actor(steps.if_permitted, os.setresuid, self.real, self.effective, self.saved)


@dataclass(frozen=True)
class SetGroupIds:
    real: int
    effective: int
    saved: int

    def __call__(self, role: Role) -> None:
        role.actor(steps.if_permitted, os.setresgid, self.real, self.effective, self.saved)


@dataclass(frozen=True)
class SetGroups:
    first: int
    count: int

    def __call__(self, role: Role) -> None:
        groups = list(range(self.first, self.first + self.count))
        role.actor(steps.if_permitted, os.setgroups, groups)


@dataclass(frozen=True)
class Fork:
    """The child goes on; the parent ends, or stays with its copies of the sockets."""

    parent_ends: bool

    def __call__(self, role: Role) -> None:
        child = role.stage.fork(role.actor)
        if self.parent_ends:
            role.actor.exit()
        role.actor = child


@dataclass(frozen=True)
class Execute:
    def __call__(self, role: Role) -> None:
        role.actor.execute(kept=role.fds or ())


@dataclass(frozen=True)
class HandOver:
    """A process of another user goes on with the sockets."""

    uid: int
    giver_ends: bool

    def __call__(self, role: Role) -> None:
        heir = role.stage.actor(self.uid)
        if role.fds:
            role.fds = Both(*role.actor.give(role.fds, to=heir))
        if self.giver_ends:
            role.actor.exit()
        role.actor = heir


@dataclass(frozen=True)
class Duplicate:
    """The sockets get other numbers; the former ones are closed."""

    def __call__(self, role: Role) -> None:
        if role.fds:
            copies = Both(*(role.actor(os.dup, fd) for fd in role.fds))
            role.actor(steps.close, role.fds)
            role.fds = copies


@dataclass(frozen=True)
class AsThread:
    """A call made by a thread, with ids of its own if it may have them."""

    uid: int | None
    groups: int

    def __call__(self, actor: Actor, step: Callable[..., None], *arguments: object) -> None:
        credentials = (self.uid, self.uid ^ 1, tuple(range(self.groups))) if self.uid else None
        actor(steps.in_thread_if_permitted, credentials, step, *arguments)


uids = st.sampled_from([UNCHANGED, 0, ALICE, BOB, CAROL, LARGEST_ID])
deeds = st.lists(
    st.one_of(
        st.builds(SetUserIds, uids, uids, uids),
        st.builds(SetGroupIds, uids, uids, uids),
        st.builds(SetGroups, st.integers(0, LARGEST_ID - 40), st.integers(0, 40)),
        st.builds(Fork, st.booleans()),
        st.builds(Execute),
        st.builds(HandOver, st.sampled_from([0, ALICE, BOB, CAROL]), st.booleans()),
        st.builds(Duplicate),
    ),
    max_size=4,
)
threads = st.none() | st.builds(
    AsThread, st.none() | uids.filter(lambda uid: uid > 0), st.integers(0, 40)
)
connects = st.sampled_from([steps.connect, steps.connect_nonblocking, *map(ByRing, Mode)])


def call(
    role: Role, thread: AsThread | None, step: Callable[..., None], *arguments: object
) -> None:
    if thread:
        thread(role.actor, step, *arguments)
    else:
        role.actor(step, *arguments)


@settings(max_examples=100, deadline=None, database=None)
@given(
    route=st.sampled_from(LOOPBACK),
    how=connects,
    threads=st.tuples(threads, threads),
    of_server=st.tuples(deeds, deeds, deeds),
    of_client=st.tuples(deeds, deeds, deeds),
    client_ends_first=st.booleans(),
)
def test_no_sequence_of_deeds_makes_the_transports_disagree(
    origin: Origin,
    client: Client,
    route: Route,
    how: Connect,
    threads: tuple[AsThread | None, AsThread | None],
    of_server: tuple[list[Deed], list[Deed], list[Deed]],
    of_client: tuple[list[Deed], list[Deed], list[Deed]],
    client_ends_first: bool,
) -> None:
    with Stage(origin, client) as stage:
        listening, connecting = Role(stage, stage.actor()), Role(stage, stage.actor())

        listening.play(of_server[0])
        listening.fds = listening.actor(steps.bind, route)
        targets = listening.actor(steps.addresses, listening.fds, route)
        call(listening, threads[0], steps.listen, listening.fds)
        listening.play(of_server[1])

        connecting.fds = connecting.actor(steps.sockets, route)
        connecting.play(of_client[0])
        call(connecting, threads[1], how, connecting.fds, targets)
        connecting.play(of_client[1])

        serving = Role(stage, listening.actor, listening.actor(steps.accept, listening.fds))
        answers = [peers(stage, serving, connecting)]
        serving.play(of_server[2])
        answers.append(peers(stage, serving, connecting))
        connecting.play(of_client[2])
        answers.append(peers(stage, serving, connecting))
        assert answers[0] == answers[1] == answers[2]

        first, last = (connecting, serving) if client_ends_first else (serving, connecting)
        assert first.fds
        assert last.fds
        first.actor(steps.close, first.fds)
        assert stage.peer(last.actor, last.fds) == answers[0][last is connecting]


def peers(stage: Stage, serving: Role, connecting: Role) -> tuple[Peer, Peer]:
    """Whom the server sees, and whom the client sees."""
    assert serving.fds
    assert connecting.fds
    return stage.peer(serving.actor, serving.fds), stage.peer(connecting.actor, connecting.fds)
