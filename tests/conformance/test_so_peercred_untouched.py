"""Where there is nothing to say, getsockopt() does what it does without the program."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import product
from pathlib import Path

import pytest

from harness import getsockopt as others
from harness import so_peercred, steps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.routes import V4, V6
from harness.so_peercred import SO_PEERGROUPS, Told, getsockopt
from harness.stage import Stage
from harness.steps import IPPROTO_MPTCP, Route
from harness.users import ALICE, SERVICE
from peercredd import hooks, pins
from peercredd.libbpf import attach_to_cgroup, get_pinned

pytestmark = pytest.mark.kernel

SO_PEERPIDFD = 77

OPTIONS = (
    # SO_PEERPIDFD opens a descriptor each time.
    *((socket.SOL_SOCKET, option) for option in range(90) if option != SO_PEERPIDFD),
    *((socket.IPPROTO_IP, option) for option in (*range(70), *range(80, 84))),
    *((socket.IPPROTO_IPV6, option) for option in range(90)),
    *((socket.IPPROTO_TCP, option) for option in range(50)),
    *((level, option) for level in (socket.IPPROTO_UDP, 284, 12345) for option in range(8)),
)
"""Level and name of every option there is, and of many that there are not."""
LENGTHS = (-1, 0, 1, 4, 7, 12, 64, 4096, 4097, 20_000)

UNCONNECTED = {
    "TCP over IPv4": (socket.AF_INET, socket.SOCK_STREAM, 0),
    "TCP over IPv6": (socket.AF_INET6, socket.SOCK_STREAM, 0),
    "MPTCP": (socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP),
    "UDP": (socket.AF_INET6, socket.SOCK_DGRAM, 0),
    "raw": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "unix stream": (socket.AF_UNIX, socket.SOCK_STREAM, 0),
    "unix datagram": (socket.AF_UNIX, socket.SOCK_DGRAM, 0),
    "netlink": (socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "packet": (socket.AF_PACKET, socket.SOCK_DGRAM, 0),
}


@pytest.fixture(scope="module")
def unattached(hook_set: str) -> Iterator[tuple[Cgroup, Daemon, Origin]]:
    """A capture whose getsockopt() program is attached nowhere."""
    with (
        Cgroup() as cgroup,
        Daemon(cgroup, hook_set, so_peercred=False) as daemon,
        Origin(cgroup) as origin,
    ):
        yield cgroup, daemon, origin


@contextmanager
def attached(cgroup: Cgroup, pin_dir: Path) -> Iterator[None]:
    """Attach the program to the cgroup meanwhile."""
    program = get_pinned(pin_dir / pins.CAPTURE / pins.PROGRAMS / hooks.SO_PEERCRED.name)
    directory = os.open(cgroup.path, os.O_RDONLY)
    try:
        link = attach_to_cgroup(program, directory, hooks.SO_PEERCRED.attach_type)
    finally:
        os.close(directory)
        os.close(program)
    try:
        yield
    finally:
        os.close(link)


def all_told(sock: socket.socket) -> dict[tuple[int, int, int, int], Told]:
    """Every option, with buffers of every length, and with none."""
    return {
        (level, option, length, room): getsockopt(sock, level, option, length, room)
        for (level, option), length in product(OPTIONS, LENGTHS)
        for room in ((-1, 0) if length in (4, 12) else (-1,))
    }


def assert_untouched(
    cgroup: Cgroup, daemon: Daemon, sock: socket.socket, given: frozenset[int] = frozenset()
) -> None:
    """Ask for everything without the program, with it, and without; `given` is what it gives."""
    before = all_told(sock)
    with attached(cgroup, daemon.pin_dir):
        meanwhile = all_told(sock)
    after = all_told(sock)
    # Some, such as TCP_INFO, are another every time; that of one byte may be the same by chance.
    restless = {call[:2] for call in before if before[call] != after[call]}
    for call, told in meanwhile.items():
        level, option, length, _ = call
        if level == socket.SOL_SOCKET and option in given:
            continue
        if length < 0 and told.errno == errno.EINVAL:
            # In a cgroup with any such program the kernel looks at the length first. Some of
            # IPv6's options do without one as long as they are not set.
            assert before[call].errno or level == socket.IPPROTO_IPV6
            continue
        if (level, option) not in restless:
            assert told == before[call], call
        else:
            assert told[:2] == before[call][:2], call


@pytest.mark.parametrize("kind", UNCONNECTED.values(), ids=UNCONNECTED)
def test_every_option_of_a_socket_without_a_record_is_untouched(
    unattached: tuple[Cgroup, Daemon, Origin], kind: tuple[int, int, int]
) -> None:
    cgroup, daemon, origin = unattached
    with closing(origin.actor()) as actor, actor.borrow(actor(steps.open_socket, *kind)) as sock:
        assert_untouched(cgroup, daemon, sock)


@pytest.mark.parametrize("route", [V4, V6], ids=str)
def test_every_other_option_of_a_connections_ends_is_untouched(
    unattached: tuple[Cgroup, Daemon, Origin], route: Route
) -> None:
    cgroup, daemon, origin = unattached
    ours = frozenset((socket.SO_PEERCRED, SO_PEERGROUPS))
    with daemon.client() as client, Stage(origin, client) as stage:
        server, connecting = stage.actor(SERVICE), stage.actor(ALICE)
        listener = stage.listen(server, route)
        ends = stage.connect(connecting, listener)
        accepted = server(steps.accept, listener.fds)
        for actor, fds in ((server, accepted), (connecting, ends), (server, listener.fds)):
            for fd, given in ((fds.tcp, ours), (fds.unix, frozenset())):
                with actor.borrow(fd) as sock:
                    assert_untouched(cgroup, daemon, sock, given)


def test_without_the_program_there_is_no_answer_and_with_it_there_is(
    unattached: tuple[Cgroup, Daemon, Origin],
) -> None:
    cgroup, daemon, origin = unattached
    with daemon.client() as client, Stage(origin, client) as stage, ExitStack() as resources:
        server, connecting = stage.actor(SERVICE), stage.actor(ALICE, groups=(5,))
        listener = stage.listen(server, V4)
        stage.connect(connecting, listener)
        accepted = server(steps.accept, listener.fds)
        expected = so_peercred.as_told_by_tcp(server(steps.peer, accepted.unix))
        assert server(steps.tcp_peer, accepted.tcp) == (so_peercred.NOBODY, None)
        resources.enter_context(attached(cgroup, daemon.pin_dir))
        assert server(steps.tcp_peer, accepted.tcp) == expected
        resources.close()
        assert server(steps.tcp_peer, accepted.tcp) == (so_peercred.NOBODY, None)


def test_what_another_program_has_answered_stays(
    unattached: tuple[Cgroup, Daemon, Origin],
) -> None:
    cgroup, daemon, origin = unattached
    with daemon.client() as client, Stage(origin, client) as stage:
        server = stage.actor(SERVICE)
        listener = stage.listen(server, V4)
        stage.connect(stage.actor(ALICE), listener)
        accepted = server(steps.accept, listener.fds)
        with (
            others.others_program(others.NAME_ANOTHER) as program,
            others.linked(program, cgroup),
            attached(cgroup, daemon.pin_dir),
            server.borrow(accepted.tcp) as sock,
        ):
            theirs = so_peercred.NOBODY._replace(pid=others.OTHERS_PID)
            assert so_peercred.credentials(sock) == theirs
            short = getsockopt(sock, socket.SOL_SOCKET, socket.SO_PEERCRED, 4)
            assert int.from_bytes(short.buffer, sys.byteorder) == others.OTHERS_PID
