"""In every namespace TCP, and the daemon in its numbers, say what a unix socket says there."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from itertools import pairwise

import grpc
import pytest

import peercred
from harness import oracle, steps
from harness.actor_process import go_on_in_second_thread, reap_no_children
from harness.actors import Actor
from harness.daemon import Daemon
from harness.nesting import SHIFTED, WITHIN, nest
from harness.patience import patient
from harness.routes import V4
from harness.so_peercred import MAX_GROUPS, Peer, as_told_by_tcp
from harness.stage import Stage
from harness.steps import Both, Extent
from harness.syscalls import CLONE_NEWPID, CLONE_NEWUSER
from harness.users import ALICE, GAMES, STAFF
from peercred import InvalidArgument, Namespaces, PeerCredentials
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as rpc

pytestmark = pytest.mark.kernel

OVERFLOW_ID = 65534

PLACES = ("host", "container", "beside it", "within it")

REACHABLE = 101_007
"""On the host; 1007 in the container, and 7 in the one within it."""


def founder(stage: Stage, place: str) -> Actor:
    """A process in that place that is root there, and may be forked."""
    host = stage.actor()
    match place:
        case "host":
            return host
        case "within it":
            return nest(stage, nest(stage, host), WITHIN, WITHIN)
        case "container":
            return nest(stage, host)
        case _:
            return nest(stage, host, (Extent(0, 300_000, 1_000),), (Extent(0, 101_000, 1_000),))


def somebody(stage: Stage, place: str) -> Actor:
    """A process there, neither first nor root, of whose ids some are to be seen elsewhere."""
    actor = stage.fork(founder(stage, place))
    if place == "host":
        actor(steps.become, REACHABLE, STAFF, (REACHABLE, GAMES, 100_000, ALICE))
    else:
        actor(steps.become, 7, 8, (9, 10, 999))
    return actor


def answer(stage: Stage, asker: Actor, fd: int) -> PeerCredentials:
    """The daemon's, in the numbers of the asker."""
    namespaces = Namespaces.of(asker.pid)
    with asker.borrow(fd) as sock:
        found = stage.client.lookup(sock, namespaces=namespaces)
    assert found.namespaces == namespaces
    return found


def same_peer(stage: Stage, asker: Actor, ends: Both[int]) -> Peer:
    """What the asker is told of its peer: by AF_UNIX, by TCP's own options and by the daemon."""
    expected = asker(steps.peer, ends.unix)
    assert asker(steps.tcp_peer, ends.tcp) == as_told_by_tcp(expected)
    found = oracle.as_peer(answer(stage, asker, ends.tcp))
    assert found == expected, f"the daemon says {found}, AF_UNIX says {expected}"
    return found


@pytest.mark.parametrize("client_place", PLACES)
@pytest.mark.parametrize("server_place", PLACES)
def test_both_ends_are_told_in_their_own_numbers(
    stage: Stage, server_place: str, client_place: str
) -> None:
    server, client = somebody(stage, server_place), somebody(stage, client_place)
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener)
    same_peer(stage, server, server(steps.accept, listener.fds))
    same_peer(stage, client, ends)


def test_the_numbers_are_those_of_the_namespaces(stage: Stage) -> None:
    first = nest(stage, stage.actor())
    server, client = stage.fork(first), stage.fork(first)
    client(steps.become, 1007, 1008, (2, 1009))
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    assert same_peer(stage, server, accepted) == Peer(3, 1007, 1008, (2, 1009), 2)
    assert same_peer(stage, client, ends) == Peer(2, 0, 0, (), 0)
    outside = stage.peer(server, accepted)
    assert outside == Peer(client.pid, 101_007, 101_008, (100_002, 101_009), 2)

    within = stage.fork(nest(stage, first, WITHIN, WITHIN))
    theirs = Both(*server.give(accepted, to=within))
    assert same_peer(stage, within, theirs) == Peer(0, 7, 8, (OVERFLOW_ID, 9), 2)

    # And where the host has asked before, as often as it takes to keep the answer.
    assert stage.peer(client, ends)[:3] == (server.pid, 100_000, 100_000)
    assert same_peer(stage, client, ends) == Peer(2, 0, 0, (), 0)
    theirs = Both(*client.give(ends, to=within))
    assert same_peer(stage, within, theirs) == Peer(0, OVERFLOW_ID, OVERFLOW_ID, (), 0)


def test_a_process_within_is_seen_from_each_pid_namespace_around_it(stage: Stage) -> None:
    inhabitants = [stage.actor()]
    for _ in range(7):
        inhabitants.append(nest(stage, inhabitants[-1], kinds=CLONE_NEWPID))
    server, *_ = inhabitants
    *_, sixth, seventh = inhabitants
    listener = stage.listen(server, V4)
    for client, around in ((sixth, inhabitants[:-1]), (inhabitants[2], inhabitants)):
        stage.connect(client, listener)
        accepted = server(steps.accept, listener.fds)
        for asker in around:
            theirs = Both(*server.give(accepted, to=asker))
            visible = inhabitants.index(asker) <= inhabitants.index(client)
            assert bool(same_peer(stage, asker, theirs).pid) == visible

    stage.connect(seventh, listener)
    accepted = server(steps.accept, listener.fds)
    for asker in inhabitants[:-1]:
        assert same_peer(stage, asker, Both(*server.give(accepted, to=asker))).pid
    (theirs_tcp,) = server.give((accepted.tcp,), to=seventh)
    with pytest.raises(peercred.PeerCredError, match="no pid; take it for unknown, not for 0"):
        answer(stage, seventh, theirs_tcp)


@pytest.mark.parametrize("kinds", [CLONE_NEWPID, CLONE_NEWUSER], ids=["pid", "user"])
def test_each_of_the_two_may_be_named_alone(stage: Stage, kinds: int) -> None:
    asker = stage.fork(nest(stage, stage.actor(), kinds=kinds))
    client = stage.actor()
    client(steps.become, REACHABLE, ALICE, (REACHABLE,))
    listener = stage.listen(asker, V4)
    stage.connect(client, listener)
    accepted = asker(steps.accept, listener.fds)
    told = same_peer(stage, asker, accepted)

    theirs = Namespaces.of(asker.pid)
    only = Namespaces(pid=theirs.pid) if kinds == CLONE_NEWPID else Namespaces(user=theirs.user)
    with asker.borrow(accepted.tcp) as sock:
        found = stage.client.lookup(sock, namespaces=only)
    assert oracle.as_peer(found) == told
    assert found.namespaces == theirs
    assert (found.pid, found.uid) == (
        (0, REACHABLE) if kinds == CLONE_NEWPID else (client.pid, 1007)
    )


def test_without_namespaces_the_numbers_are_those_of_the_initial_ones_and_it_says_so(
    stage: Stage,
) -> None:
    asker = somebody(stage, "container")
    listener = stage.listen(asker, V4)
    stage.connect(somebody(stage, "within it"), listener)
    accepted = asker(steps.accept_one, listener.fds.tcp)
    asker(steps.accept_one, listener.fds.unix)
    unnamed = stage.answer(asker, accepted)
    assert unnamed.namespaces == Namespaces.own()
    assert (unnamed.uid, unnamed.gid) == (101_007, 101_008)
    with asker.borrow(accepted) as sock:
        for same in (Namespaces(), Namespaces.own(), Namespaces(pid=unnamed.namespaces.pid)):
            assert stage.client.lookup(sock, namespaces=same) == unnamed


def extents(count: int) -> tuple[Extent, ...]:
    """So many, in neither order nor touching, root's first."""
    # The kernel takes 340 extents, and no more text than a page.
    rest = [Extent(2 * n, 9_999 - 20 * n, 2) for n in range(1, count)]
    return (Extent(0, 100_000, 1), *rest[::2], *rest[1::2])


def edges(extent: Extent) -> Iterator[int]:
    """Ids about the ends of an extent, as the host knows them."""
    end = extent.outside + extent.length
    yield from (extent.outside - 1, extent.outside, end - 1, end)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 340])
def test_maps_of_any_number_of_extents_are_followed(stage: Stage, count: int) -> None:
    maps = extents(count)
    asker = stage.fork(nest(stage, stage.actor(), maps, maps))
    ids = [id_ for extent in (*maps[:4], *maps[-4:]) for id_ in edges(extent)][:MAX_GROUPS]
    listener = stage.listen(asker, V4)
    for uid, gid in pairwise((*ids[-4:], ids[0])):
        client = stage.actor(uid, gid, ids)
        stage.connect(client, listener)
        told = same_peer(stage, asker, asker(steps.accept, listener.fds))
        assert OVERFLOW_ID in told.groups
        assert set(told.groups) != {OVERFLOW_ID}


@pytest.mark.parametrize(
    ("uids", "gids"),
    [
        ((Extent(0, ALICE, 1),), (Extent(0, STAFF, 1),)),
        ((Extent(0, 0, 2**32 - 1),), (Extent(0, 0, 2**32 - 1),)),
        ((Extent(0, 2**31, 2**31 - 1),), SHIFTED),
        ((Extent(0, 100_000, 1), Extent(2**32 - 3, ALICE, 1)), (Extent(0, GAMES, 2),)),
    ],
    ids=["one id", "all ids", "large ids outside", "large ids inside"],
)
def test_uids_and_gids_follow_each_their_own_map(
    stage: Stage, uids: tuple[Extent, ...], gids: tuple[Extent, ...]
) -> None:
    asker = stage.fork(nest(stage, stage.actor(), uids, gids))
    listener = stage.listen(asker, V4)
    for id_ in (0, 1, ALICE, STAFF, GAMES, OVERFLOW_ID, 2**31, 2**32 - 2):
        stage.connect(stage.actor(id_, id_, (id_, STAFF, 0)), listener)
        same_peer(stage, asker, asker(steps.accept, listener.fds))


def test_real_saved_and_file_system_ids_are_translated_as_well(stage: Stage) -> None:
    first = nest(stage, stage.actor())
    server, client = stage.fork(first), stage.fork(first)
    client(os.setresgid, 21, 22, 23)
    client(os.setresuid, 31, 32, 33)
    listener = stage.listen(server, V4)
    stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    told = answer(stage, server, accepted.tcp)
    assert (told.real_uid, told.uid, told.saved_uid, told.filesystem_uid) == (31, 32, 33, 32)
    assert (told.real_gid, told.gid, told.saved_gid, told.filesystem_gid) == (21, 22, 23, 22)
    assert told.tid == told.pid == 3

    unnamed = stage.answer(server, accepted.tcp)
    for field in ("process_start_time_ns", "comm", "effective_capabilities", "cgroup_id"):
        assert getattr(told, field) == getattr(unnamed, field)
    assert Namespaces(pid=told.pid_namespace, user=told.user_namespace) == told.namespaces


def test_a_thread_other_than_the_first_has_no_number_elsewhere(stage: Stage) -> None:
    first = nest(stage, stage.actor())
    server, client = stage.fork(first), stage.fork(first)
    listener = stage.listen(server, V4)
    fds = client(steps.sockets, V4)
    client(steps.in_thread, None, steps.connect, fds, listener.addresses)
    accepted = server(steps.accept, listener.fds)
    assert same_peer(stage, server, accepted).pid == 3
    assert answer(stage, server, accepted.tcp).tid is None


def test_a_process_that_has_ended_keeps_its_number(stage: Stage) -> None:
    first = nest(stage, stage.actor())
    server, client = stage.fork(first), stage.fork(first)
    client(steps.become, 5)
    listener = stage.listen(server, V4)
    stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    client.exit()
    assert same_peer(stage, server, accepted)[:2] == (3, 5)


def test_a_later_namespace_of_the_same_inode_number_does_not_see_the_peer(stage: Stage) -> None:
    server, parent = stage.actor(), stage.actor()
    listener = stage.listen(server, V4)
    parent(reap_no_children)
    parent(steps.unshare, CLONE_NEWPID)
    client = stage.fork(parent)
    inside = Namespaces(pid=Namespaces.of(client.pid).pid)
    # A unix socket would keep its peer's namespace, as a pidfd does.
    client(steps.connect_one, client(steps.sockets, V4).tcp, listener.addresses.tcp)
    fd = server(steps.accept_one, listener.fds.tcp)
    with server.borrow(fd) as accepted:
        assert stage.client.lookup(accepted, namespaces=inside).pid == 1
        client.close()
        with pytest.raises(InvalidArgument):
            stage.client.lookup(accepted, namespaces=inside)
        parent.close()
        deadline = time.monotonic() + patient(30)
        while (
            Namespaces.of((later := nest(stage, stage.actor(), kinds=CLONE_NEWPID)).pid).pid
            != inside.pid
        ):
            assert time.monotonic() < deadline, "the kernel does not use the number again"
        assert stage.client.lookup(accepted, namespaces=inside).pid == 0
        (there,) = server.give((fd,), to=later)
        told, _ = later(steps.tcp_peer, there)
        assert told == (0, 0, 0)
        assert stage.client.lookup(accepted).pid == client.pid


@pytest.fixture
def connected(stage: Stage) -> Iterator[socket.socket]:
    """A socket whose peer is known, in the tests' own process."""
    server = stage.actor()
    listener = stage.listen(server, V4)
    stage.connect(somebody(stage, "container"), listener)
    with server.borrow(server(steps.accept, listener.fds).tcp) as accepted:
        yield accepted


def no_namespaces() -> Iterator[tuple[str, Namespaces]]:
    """Numbers that are not those of a namespace of that kind with a process in it."""
    own = Namespaces.own()
    for unknown in (0, 1, 2**32 - 1):
        yield "pid_namespace", Namespaces(pid=unknown)
        yield "user_namespace", Namespaces(user=unknown, pid=own.pid)
    yield "pid_namespace", Namespaces(pid=own.user)
    yield "user_namespace", Namespaces(user=own.pid)


def test_a_number_that_is_no_namespaces_is_refused_and_never_answered_untranslated(
    stage: Stage, connected: socket.socket
) -> None:
    for field, namespaces in no_namespaces():
        with pytest.raises(InvalidArgument, match="send the inode number of /proc") as refused:
            stage.client.lookup(connected, namespaces=namespaces)
        assert refused.value.field == f"namespaces.{field}"
        with pytest.raises(InvalidArgument, match="send the inode number of /proc"):
            stage.client.lookup_many([connected] * 3, namespaces=namespaces)


def test_a_namespace_that_has_ended_is_refused(stage: Stage, connected: socket.socket) -> None:
    parent = stage.actor()
    parent(reap_no_children)
    parent(steps.unshare, CLONE_NEWPID | CLONE_NEWUSER)
    inhabitant = stage.fork(parent)
    pid, user = (inside := Namespaces.of(inhabitant.pid)).pid, inside.user
    assert stage.client.lookup(connected, namespaces=inside).pid == 0
    inhabitant.exit()
    with pytest.raises(InvalidArgument):
        stage.client.lookup(connected, namespaces=Namespaces(pid=pid))
    # Its parent is still in the one, and never was in the other.
    assert stage.client.lookup(connected, namespaces=Namespaces(user=user)).uid == OVERFLOW_ID
    parent.exit()
    with pytest.raises(InvalidArgument):
        stage.client.lookup(connected, namespaces=Namespaces(user=user))


def test_a_namespace_whose_first_process_lost_its_first_thread_is_known(
    stage: Stage, connected: socket.socket
) -> None:
    first = nest(stage, stage.actor())
    inside = Namespaces.of(first.pid)
    first(go_on_in_second_thread)
    assert stage.client.lookup(connected, namespaces=inside).uid == 7


def test_every_way_to_ask_gives_the_same_numbers(
    stage: Stage, daemon: Daemon, connected: socket.socket
) -> None:
    inside = Namespaces.of(nest(stage, stage.actor()).pid)
    expected = stage.client.lookup(connected, namespaces=inside)
    assert (expected.uid, expected.pid) == (7, 0)
    cookie = oracle.cookie(connected)
    pair = connected.getsockname(), connected.getpeername()
    assert stage.client.lookup_cookie(cookie, namespaces=inside) == expected
    assert stage.client.lookup_tuple(*pair, namespaces=inside).uid == 7
    assert stage.client.lookup_many([connected] * 101, namespaces=inside) == [expected] * 101

    async def ask() -> None:
        async with peercred.AsyncClient(daemon.address) as client:
            assert await client.lookup(connected, namespaces=inside) == expected
            assert await client.lookup_cookie(cookie, namespaces=inside) == expected
            assert (await client.lookup_tuple(*pair, namespaces=inside)).uid == 7
            assert await client.lookup_many([connected], namespaces=inside) == [expected]

    asyncio.run(ask())


def test_each_request_of_a_stream_names_its_own_namespaces(
    stage: Stage, daemon: Daemon, connected: socket.socket
) -> None:
    inside = Namespaces.of(nest(stage, stage.actor()).pid)
    asked = [
        pb.Namespaces(),
        pb.Namespaces(user_namespace=inside.user),
        pb.Namespaces(pid_namespace=1),
        pb.Namespaces(pid_namespace=inside.pid, user_namespace=inside.user),
    ]
    key = pb.ConnectionKey(socket_cookie=oracle.cookie(connected))
    requests = [pb.LookupStreamRequest(key=key, namespaces=each) for each in asked]
    with grpc.insecure_channel(daemon.address) as channel:
        stream = rpc.PeerCredentialsStub(channel).LookupStream(iter(requests))
        outside, user, unknown, both = (response.result for response in stream)
    plain = stage.client.lookup(connected)
    assert (outside.found.peer.pid, outside.found.peer.uid) == (plain.pid, 100_007)
    assert (user.found.peer.pid, user.found.peer.uid) == (plain.pid, 7)
    assert unknown.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert (both.found.peer.pid, both.found.peer.uid) == (0, 7)
