"""Programs that know nothing of this project ask for the peer of a TCP socket."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from harness import placed
from harness.actors import PYTHON
from harness.cgroup import Cgroup
from harness.daemon import Client, Daemon, wait_until_empty
from harness.requirements import cannot_run
from harness.so_peercred import NOBODY, Credentials
from harness.users import ALICE, GAMES, SERVICE, STAFF

pytestmark = pytest.mark.kernel


class Server(NamedTuple):
    """A program in `servers`, in one language."""

    file: str
    build: tuple[str, ...] = ()
    """The words that make the file; a script is there."""
    interpreter: str | None = None


SERVERS = {
    "C": Server("peer-c", build=("gcc", "-Wall", "-Werror", "-o", "peer-c", "peer.c")),
    "Go": Server("peer-go", build=("go", "build", "-o", "peer-go", "peer.go")),
    "Perl": Server("peer.pl", interpreter="perl"),
    "CPython": Server("peer.py", interpreter="/usr/bin/python3"),
}

CONNECT = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1]))).recv(1)"

AUTHENTICATE = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as bus:
    bus.sendall(b"\\0AUTH EXTERNAL " + sys.argv[2].encode().hex().encode() + b"\\r\\n")
    print(bus.recv(100).split()[0].decode())
"""
"""Claim a uid, as in the D-Bus specification, and print how the bus answers."""

DAEMON, OWNER = 1, 65534
"""Users that every machine has: a bus looks for itself and its clients in the list of users."""

FIRST_NAME = ":1.0"
"""Of the first client that a bus welcomes."""


class Told(NamedTuple):
    """What a server has printed, and the process that connected to it."""

    peer: Credentials
    client_pid: int


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The programs, where every user may run them: the project may lie in a private home."""
    with tempfile.TemporaryDirectory(prefix="peercredd-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(Path(__file__).with_name("servers"), folder, dirs_exist_ok=True)
        yield folder


@pytest.fixture(autouse=True)
def nothing_left(client: Client) -> Iterator[None]:
    """What a program's sockets left is gone before another test counts records."""
    yield
    wait_until_empty(client)


def built(server: Server, folder: Path) -> list[str | Path]:
    """The words that run a server."""
    needed = server.interpreter or server.build[0]
    if not shutil.which(needed):
        cannot_run(f"no {needed}: ./dev test installs it")
    if server.interpreter:
        return [server.interpreter, folder / server.file]
    # Go: no network, no cache of somebody's, and a file that is in no module.
    settings = {"GO111MODULE": "off", "GOPROXY": "off", "GOTOOLCHAIN": "local"}
    settings |= {"CGO_ENABLED": "0", "GOCACHE": str(folder / "cache")}
    subprocess.run(server.build, check=True, cwd=folder, env=os.environ | settings)
    return [folder / server.file]


def told(server: list[str | Path], cgroup: Cgroup) -> Told:
    """Let a server of SERVICE's accept a client of ALICE's, both in a cgroup."""
    with placed.running(placed.command(cgroup, SERVICE, *server)) as serving:
        assert serving.stdout
        port = serving.stdout.readline().strip()
        connect = placed.command(cgroup, ALICE, PYTHON, "-c", CONNECT, port)
        with placed.running(connect) as connecting:
            answer = serving.stdout.readline()
            return Told(Credentials(*map(int, answer.split())), connecting.pid)


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_an_unmodified_program_is_told_its_peer_by_the_kernel_and_without_us_nobody(
    daemon: Daemon, cgroup: Cgroup, folder: Path, server: Server
) -> None:
    program = built(server, folder)

    with Cgroup() as bare:
        assert told(program, bare).peer == NOBODY

    answer = told(program, cgroup)
    assert answer.peer == Credentials(answer.client_pid, ALICE, ALICE)


@contextmanager
def bus(cgroup: Cgroup, folder: Path) -> Iterator[str]:
    """A dbus-daemon on TCP, in a cgroup; where to reach it."""
    if not shutil.which("dbus-daemon"):
        cannot_run("no dbus-daemon: ./dev test installs it")
    daemon = ("dbus-daemon", "--nofork", "--print-address", "--config-file", folder / "bus.conf")
    with placed.running(placed.command(cgroup, OWNER, *daemon)) as serving:
        assert serving.stdout
        yield serving.stdout.readline().strip()


def port_of(address: str) -> str:
    (port,) = re.findall(r"port=(\d+)", address)
    return str(port)


@contextmanager
def asking_who_i_am(cgroup: Cgroup, address: str) -> Iterator[subprocess.Popen[str]]:
    """DAEMON, in two groups, asks a bus for the credentials of its first client: itself."""
    words = placed.command(
        cgroup,
        DAEMON,
        *("dbus-send", f"--bus={address}", "--print-reply", "--dest=org.freedesktop.DBus"),
        *("/", "org.freedesktop.DBus.GetConnectionCredentials", f"string:{FIRST_NAME}"),
        groups=(STAFF, GAMES),
    )
    with placed.running(words) as asking:
        yield asking


def test_dbus_daemon_on_tcp_knows_its_clients_by_the_kernel_and_without_us_lets_nobody_in(
    daemon: Daemon, cgroup: Cgroup, folder: Path
) -> None:
    with (
        Cgroup() as bare,
        bus(bare, folder) as address,
        asking_who_i_am(bare, address) as refused,
    ):
        assert refused.communicate()[0] == ""
        assert refused.returncode == 1

    with bus(cgroup, folder) as address, asking_who_i_am(cgroup, address) as asking:
        answer, _ = asking.communicate()
    numbers = dict(re.findall(r'string "(\w+)"\s+variant\s+uint32 (\d+)', answer))
    assert numbers == {"ProcessID": str(asking.pid), "UnixUserID": str(DAEMON)}
    groups = re.search(r'string "UnixGroupIDs"\s+variant\s+array \[([\s\duint]+)\]', answer)
    assert groups, answer
    assert {STAFF, GAMES} <= set(map(int, groups[1].replace("uint32", "").split()))


@pytest.mark.parametrize(("claimed", "verdict"), [(DAEMON, "OK"), (0, "REJECTED")])
def test_dbus_daemon_on_tcp_believes_a_client_only_its_own_uid(
    daemon: Daemon, cgroup: Cgroup, folder: Path, claimed: int, verdict: str
) -> None:
    with bus(cgroup, folder) as address:
        claim = placed.command(
            cgroup, DAEMON, PYTHON, "-c", AUTHENTICATE, port_of(address), str(claimed)
        )
        answer = subprocess.run(claim, check=True, stdout=subprocess.PIPE, text=True).stdout

    assert answer.strip() == verdict
