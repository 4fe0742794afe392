"""A client that wants to be taken for somebody else."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import psutil
import pytest

from bench.rivals import proc_net_tcp_row, psutil_scan
from harness import steps
from harness.actors import PYTHON, Actor
from harness.cgroup import Cgroup
from harness.io_uring import Mode
from harness.requirements import cannot_run
from harness.routes import V4
from harness.set_user_id import set_user_id_copy
from harness.stage import Stage
from harness.steps import Address, Both, SendByRing
from harness.syscalls import CLONE_NEWNET
from harness.users import ALICE, BOB, CAROL, SERVICE
from peercred import NotFound

pytestmark = pytest.mark.kernel

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
FAST_OPEN = 0x607
"""net.ipv4.tcp_fastopen: both ends may, without a cookie."""


def uid_in_proc_net_tcp(local: Address, remote: Address) -> int | None:
    """What identd, and whoever reads /proc/net/tcp, says of a client."""
    row = proc_net_tcp_row(Path("/proc/net/tcp").read_bytes(), local, remote)
    return row[0] if row else None


def who(stage: Stage, server: Actor, fd: int) -> int | str:
    """The uid of a client, or why nobody is known."""
    try:
        return stage.answer(server, fd).uid
    except NotFound as error:
        return error.reason


def test_a_client_that_leaves_at_once_is_not_taken_for_root(stage: Stage) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    names = server(steps.names, accepted.tcp)
    client.exit()
    server(steps.shutdown, accepted.tcp, socket.SHUT_WR)
    # In TIME_WAIT there is no socket any more that could have an owner.
    assert uid_in_proc_net_tcp(*names) == 0
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


def test_whoever_takes_over_the_pid_of_a_client_does_not_become_the_client(stage: Stage) -> None:
    server, parent = stage.actor(SERVICE), stage.actor()
    listener = stage.listen(server, V4)
    client = stage.fork(parent)
    client(steps.become, ALICE)
    stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    started = stat_start_ns(client.pid)
    client.exit()
    parent(os.waitpid, client.pid, 0)
    wait_for_a_later_tick(started)
    try:
        heir = stage.keep(parent.fork(pid=client.pid))
    except PermissionError as error:
        cannot_run(
            f"no pid may be chosen here: {error}: run the tests as root of the pid namespace"
        )
    assert heir.pid == client.pid
    heir(steps.become, CAROL)

    answer = stage.answer(server, accepted.tcp)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    # Who looks the number up afterwards, as with SO_PEERCRED's pid, finds somebody else...
    assert psutil.Process(answer.pid).uids().effective == CAROL
    # ... and can tell by this, and by nothing that SO_PEERCRED gives.
    assert answer.process_start_time_ns is not None
    assert answer.process_start_time_ns // TICK_NS * TICK_NS == started
    assert started < stat_start_ns(heir.pid)


def stat_start_ns(pid: int) -> int:
    """Field 22 of /proc/PID/stat, ns since boot."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return ticks * TICK_NS


def wait_for_a_later_tick(start: int) -> None:
    """Wait until whoever starts has another start in /proc/PID/stat."""
    while time.clock_gettime_ns(time.CLOCK_BOOTTIME) < start + TICK_NS:
        os.sched_yield()


def test_a_client_that_executes_a_set_user_id_program_afterwards_does_not_become_its_owner(
    stage: Stage, setuid_folder: Path
) -> None:
    program = set_user_id_copy(PYTHON, setuid_folder, 0)
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    client.execute(kept=ends, program=program)
    rival = psutil_scan(*server(steps.names, accepted.tcp))
    assert rival is not None
    assert (rival.uid, rival.pid) == (0, client.pid)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


def test_a_socket_that_root_made_does_not_make_its_user_root(stage: Stage) -> None:
    server, root, client = stage.actor(SERVICE), stage.actor(), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    ends = Both(*root.give(root(steps.sockets, V4), to=client))
    client(steps.connect, ends, listener.addresses)
    accepted = server(steps.accept, listener.fds)
    assert uid_in_proc_net_tcp(*server(steps.names, accepted.tcp)) == 0
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("personality", [None, CAROL])
def test_who_writes_to_a_deferred_socket_through_io_uring_lends_it_no_name(
    stage: Stage, mode: Mode, personality: int | None
) -> None:
    namespace = stage.namespace()
    namespace.sysctl("net.ipv4.tcp_fastopen", FAST_OPEN)
    server = stage.actor(SERVICE, namespace=namespace)
    client = stage.actor(ALICE, namespace=namespace)
    writer = stage.actor(namespace=namespace)
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener, steps.connect_deferred)
    theirs = Both(*client.give(ends, to=writer))
    client.exit()
    writer(SendByRing(mode, personality), theirs.tcp, b"x")
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


def test_a_connect_that_another_user_left_half_done_lends_its_name_to_nobody(
    stage: Stage, elsewhere: Stage
) -> None:
    stage.place = elsewhere.place = stage.namespace()  # where nobody else takes a port
    server, bob = stage.actor(SERVICE), stage.actor(BOB)
    listener = stage.listen(server, V4, options=(steps.DEFER_ACCEPT,))
    ends = stage.connect(bob, listener)
    local = bob(steps.own_name, ends.tcp)
    # Bob has gone no further than his SYN, as the server sees it. His reset takes that away.
    bob(steps.reset, ends.tcp)

    # Alice is not recorded, so nothing of hers takes the place of what Bob has published.
    alice = elsewhere.actor(ALICE)
    theirs = elsewhere.connect(alice, listener, local=local)
    alice(steps.write, theirs)
    server(steps.accept_one, listener.fds.unix)
    accepted = server(steps.accept, listener.fds)
    assert server(steps.names, accepted.tcp)[1] == local
    assert stage.refusal(server, accepted.tcp) == "NEVER_SEEN"
    alice(steps.reset, theirs.tcp)
    server(steps.close, accepted)

    # What Bob has published is replaced by nobody but those who are recorded.
    carol = stage.actor(CAROL)
    last = stage.connect(carol, listener, local=local)
    carol(steps.write, last)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (carol.pid, CAROL)


@pytest.mark.parametrize("when", ["before socket()", "before connect()", "after connect()"])
def test_who_moves_to_another_cgroup_is_who_he_is_or_nobody(stage: Stage, when: str) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    with Cgroup() as refuge:
        if when == "before socket()":
            refuge.add(client.pid)
        ends = client(steps.sockets, V4)
        if when == "before connect()":
            refuge.add(client.pid)
        client(steps.connect, ends, listener.addresses)
        if when == "after connect()":
            refuge.add(client.pid)
        accepted = server(steps.accept, listener.fds)
        # It is the socket's cgroup that counts: the one that it was made in.
        if when == "before socket()":
            assert stage.refusal(server, accepted.tcp) == "NEVER_SEEN"
        else:
            assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
        client.exit()


def test_who_comes_into_the_captured_cgroup_with_a_socket_is_who_he_is_or_nobody(
    stage: Stage, elsewhere: Stage, cgroup: Cgroup
) -> None:
    server, client = stage.actor(SERVICE), elsewhere.actor(ALICE)
    listener = stage.listen(server, V4)
    ends = client(steps.sockets, V4)
    cgroup.add(client.pid)
    client(steps.connect, ends, listener.addresses)
    accepted = server(steps.accept, listener.fds)
    assert who(stage, server, accepted.tcp) in (ALICE, "NEVER_SEEN")
    client.exit()


def test_an_unprivileged_root_of_namespaces_of_his_own_is_who_he_is(stage: Stage) -> None:
    """In them he may do all: change addresses, become every user that he has a number for."""
    client = stage.actor(ALICE)
    if not client(steps.if_permitted, steps.found_namespaces, CLONE_NEWNET, ALICE):
        cannot_run("users may have no namespaces here: sysctl user.max_user_namespaces")
    assert client(os.geteuid) == 0
    client(steps.bring_loopback_up)
    server = stage.fork(client)
    listener = stage.listen(server, V4)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    # He asks nobody; whoever is handed the socket, or runs there as well, does.
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, ALICE)
