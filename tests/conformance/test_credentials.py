from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from harness import steps
from harness.actor_process import go_on_in_second_thread
from harness.actors import PYTHON, Actor
from harness.nesting import unshare
from harness.routes import V4
from harness.set_user_id import set_user_id_copy
from harness.so_peercred import MAX_GROUPS, Peer
from harness.stage import Stage
from harness.steps import Route
from harness.syscalls import CLONE_NEWPID, CLONE_NEWUSER, syscall
from harness.users import ALICE, BOB, CAROL, DAVE, GAMES, SERVICE, STAFF

pytestmark = pytest.mark.kernel

LARGEST_ID = 2**32 - 2


def become_root_of_user_namespace(actor: Actor, uid: int) -> None:
    """Let an actor that is root enter a user namespace whose root is `uid` outside."""
    unshare(actor, CLONE_NEWUSER)
    # What root writes is allowed everywhere; a user's own maps are not.
    for ids in ("uid_map", "gid_map"):
        Path(f"/proc/{actor.pid}/{ids}").write_text(f"0 {uid} 1")
    actor(steps.become, 0)


@pytest.mark.parametrize(
    "ids",
    [
        (ALICE, BOB, CAROL),
        (0, ALICE, 0),
        (ALICE, 0, ALICE),
        (0, 0, ALICE),
        (0, LARGEST_ID, 0),
        (2**31, 2**31 + 1, 2**31 + 2),
    ],
    ids=str,
)
def test_effective_ids_count_whatever_the_others_are(
    stage: Stage, route: Route, ids: tuple[int, int, int]
) -> None:
    server, client = stage.actor(SERVICE), stage.actor()
    client(os.setresgid, *(id_ ^ 2 for id_ in ids))
    client(os.setresuid, *ids)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    peer = stage.peer(server, server(steps.accept, listener.fds))
    assert (peer.uid, peer.gid) == (ids[1], ids[1] ^ 2)
    answer = stage.answer(client, ends.tcp)
    assert (answer.uid, answer.real_uid, answer.saved_uid) == (SERVICE, SERVICE, SERVICE)


def test_real_saved_and_filesystem_ids_are_told_apart(stage: Stage, route: Route) -> None:
    server, client = stage.actor(SERVICE), stage.actor()
    client(os.setresgid, 21, 22, 23)
    client(os.setresuid, ALICE, BOB, CAROL)
    listener = stage.listen(server, route)
    stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted).uid == BOB
    answer = stage.answer(server, accepted.tcp)
    assert (answer.real_uid, answer.uid, answer.saved_uid) == (ALICE, BOB, CAROL)
    assert (answer.real_gid, answer.gid, answer.saved_gid) == (21, 22, 23)
    assert (answer.filesystem_uid, answer.filesystem_gid) == (BOB, 22)


def test_what_a_process_becomes_after_connect_and_listen_is_not_asked(
    stage: Stage, route: Route
) -> None:
    server, client = stage.actor(), stage.actor()
    server(os.setgroups, [STAFF])
    client(os.setgroups, [GAMES])
    server(os.seteuid, SERVICE)
    client(os.seteuid, ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    for actor in (server, client):
        actor(os.seteuid, 0)
        actor(os.setgroups, [1, 2, 3])
        actor(os.setresgid, CAROL, CAROL, CAROL)
        actor(os.setresuid, CAROL, CAROL, CAROL)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted) == Peer(client.pid, ALICE, 0, (GAMES,), 1)
    assert stage.peer(client, ends) == Peer(server.pid, SERVICE, 0, (STAFF,), 1)


@pytest.mark.parametrize("count", [0, 1, 2, MAX_GROUPS - 1, MAX_GROUPS, MAX_GROUPS + 1, 40, 200])
def test_supplementary_groups_are_all_counted_and_32_are_named(
    stage: Stage, route: Route, count: int
) -> None:
    groups = tuple(LARGEST_ID - 7 * number for number in range(count))
    server, client = stage.actor(SERVICE, groups=groups), stage.actor(ALICE, groups=groups)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    expected = tuple(sorted(groups))[:MAX_GROUPS], count
    assert stage.peer(server, server(steps.accept, listener.fds))[3:] == expected
    assert stage.peer(client, ends)[3:] == expected


def test_a_thread_with_ids_of_its_own_connects_under_them(stage: Stage, route: Route) -> None:
    server, client = stage.actor(SERVICE), stage.actor()
    listener = stage.listen(server, route)
    for uid in (ALICE, BOB, CAROL):
        ends = client(steps.sockets, route)
        credentials = (uid, uid + 1000, (STAFF, uid))
        tid, _ = client(steps.in_thread, credentials, steps.connect, ends, listener.addresses)
        accepted = server(steps.accept, listener.fds)
        assert stage.peer(server, accepted)[:3] == (client.pid, uid, uid + 1000)
        assert stage.answer(server, accepted.tcp).tid == tid != client.pid
        assert stage.peer(client, ends).uid == SERVICE
    stage.connect(client, listener)
    assert stage.peer(server, server(steps.accept, listener.fds)).uid == 0


def test_a_thread_with_ids_of_its_own_listens_under_them(stage: Stage, route: Route) -> None:
    server, client = stage.actor(), stage.actor(ALICE)
    fds = server(steps.bind, route)
    server(steps.in_thread, (BOB, CAROL, (STAFF,)), steps.listen, fds)
    ends = client(steps.sockets, route)
    client(steps.connect, ends, server(steps.addresses, fds, route))
    assert stage.peer(client, ends) == Peer(server.pid, BOB, CAROL, (STAFF,), 1)
    assert stage.peer(server, server(steps.accept, fds)).uid == ALICE


def test_a_process_whose_first_thread_has_ended_keeps_its_number(
    stage: Stage, route: Route
) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    for actor in (server, client):
        actor(go_on_in_second_thread)
        assert actor(threading.get_native_id) != actor(os.getpid) == actor.pid
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    assert stage.peer(server, server(steps.accept, listener.fds))[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_forked_child_that_connects_is_the_client(stage: Stage, route: Route) -> None:
    server, parent = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = parent(steps.sockets, route)
    child = stage.fork(parent)
    child(steps.connect, ends, listener.addresses)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted).pid == child.pid != parent.pid
    child.exit()
    assert stage.peer(server, accepted).pid == child.pid
    assert stage.peer(parent, ends).pid == server.pid


def test_an_exec_changes_nothing_that_was_connected_or_listens(stage: Stage, route: Route) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    client.execute(kept=ends)
    server.execute(kept=listener.fds)
    accepted = server(steps.accept, listener.fds)
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)
    assert stage.peer(client, ends)[:2] == (server.pid, SERVICE)


def test_a_set_user_id_program_connects_as_its_owner_and_not_what_it_was_given(
    stage: Stage, route: Route, setuid_folder: Path
) -> None:
    python = set_user_id_copy(PYTHON, setuid_folder, CAROL)
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    before = stage.connect(client, listener)
    client.execute(kept=before, program=python)
    assert client(os.getresuid) == (ALICE, CAROL, CAROL)
    stage.connect(client, listener)
    assert stage.peer(server, server(steps.accept, listener.fds))[:3] == (client.pid, ALICE, ALICE)
    assert stage.peer(server, server(steps.accept, listener.fds))[:3] == (client.pid, CAROL, CAROL)
    assert stage.peer(client, before).uid == SERVICE


@pytest.mark.parametrize("sysctl", [0x607, 0x5], ids=["accepted", "declined"])
def test_a_set_user_id_program_that_writes_to_a_deferred_socket_lends_it_no_name(
    stage: Stage, route: Route, setuid_folder: Path, sysctl: int
) -> None:
    echo = set_user_id_copy("/bin/echo", setuid_folder, 0)
    namespace = stage.namespace()
    namespace.sysctl("net.ipv4.tcp_fastopen", sysctl)
    server = stage.actor(SERVICE, namespace=namespace)
    client = stage.actor(ALICE, namespace=namespace)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener, steps.connect_deferred)
    assert not server(steps.readable, listener.fds.tcp)
    client(steps.run_with_stdout, str(echo), "let me in", ends.tcp)
    accepted = server(steps.accept, listener.fds)
    assert server(os.read, accepted.tcp, 100) == b"let me in\n"
    assert stage.peer(server, accepted)[:2] == (client.pid, ALICE)


def test_a_user_namespaces_root_is_who_it_is_outside(stage: Stage, route: Route) -> None:
    server, client = stage.actor(SERVICE), stage.actor()
    become_root_of_user_namespace(client, ALICE)
    assert client(os.geteuid) == 0
    listener = stage.listen(server, route)
    stage.connect(client, listener)
    assert stage.peer(server, server(steps.accept, listener.fds)).uid == ALICE


def test_a_user_namespaces_root_listens_as_who_it_is_outside(stage: Stage, route: Route) -> None:
    server, client = stage.actor(), stage.actor(ALICE)
    become_root_of_user_namespace(server, SERVICE)
    ends = stage.connect(client, stage.listen(server, route))
    assert stage.peer(client, ends).uid == SERVICE


def test_a_pid_namespaces_process_has_the_number_it_has_outside(stage: Stage, route: Route) -> None:
    server, parent = stage.actor(SERVICE), stage.actor()
    parent(syscall, "unshare", CLONE_NEWPID)
    client = stage.fork(parent)
    assert client(os.getpid) == 1
    listener = stage.listen(server, route)
    stage.connect(client, listener)
    assert stage.peer(server, server(steps.accept, listener.fds)).pid == client.pid != 1


def test_whoever_calls_connect_is_the_client_not_whoever_made_the_socket(
    stage: Stage, route: Route
) -> None:
    server, maker, connector = stage.actor(SERVICE), stage.actor(ALICE), stage.actor(BOB)
    listener = stage.listen(server, route)
    ends = steps.Both(*maker.give(maker(steps.sockets, route), to=connector))
    maker.exit()
    connector(steps.connect, ends, listener.addresses)
    assert stage.peer(server, server(steps.accept, listener.fds))[:2] == (connector.pid, BOB)


def test_a_connect_of_what_is_connected_changes_nothing(stage: Stage, route: Route) -> None:
    server, client, other = stage.actor(SERVICE), stage.actor(ALICE), stage.actor(BOB)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    theirs = client.give(ends, to=other)
    for fd, target in zip(theirs, listener.addresses, strict=True):
        with pytest.raises(OSError, match="already connected"):
            other(steps.connect_one, fd, target)
    assert stage.peer(server, server(steps.accept, listener.fds))[:2] == (client.pid, ALICE)


def test_threads_that_connect_at_once_are_each_themselves(stage: Stage) -> None:
    server, client = stage.actor(SERVICE), stage.actor()
    listener = stage.listen(server, V4)
    uids = [ALICE, BOB, CAROL, DAVE] * 8
    ports = client(steps.connect_in_threads, uids, listener.addresses.tcp)
    for _ in uids:
        accepted = server(steps.accept_one, listener.fds.tcp)
        port = server(steps.names, accepted)[1][1]
        assert stage.answer(server, accepted).uid == ports[port]
