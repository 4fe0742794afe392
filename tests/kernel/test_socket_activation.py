"""A service that systemd starts for a connection: systemd has listened, the service accepts."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from harness import oracle, steps
from harness.acceptors import acceptor_of, told_acceptor
from harness.actors import PYTHON, Origin
from harness.daemon import Daemon
from harness.requirements import CAPTURE_THE_HOST
from harness.routes import V4
from harness.stage import Stage
from harness.users import ALICE

# The socket of process 1 is in the cgroup of process 1: the whole host has to be captured.
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.systemd,
    pytest.mark.hook_sets(*CAPTURE_THE_HOST),
]

UNITS = Path("/run/systemd/system")
GAMES = pwd.getpwnam("games").pw_uid
"""Of the tests' own users systemd knows none: it starts nothing for a number without a name."""

TARGET = ("127.0.0.1", 7338)
"""No unit of a test's can have a port that the kernel chooses."""

PROGRAM = """
import os, socket
with socket.socket(fileno=3) as listener:  # sd_listen_fds(3)
    connection = listener.accept()[0]
with connection:
    connection.sendall(b"%d" % os.getpid())
    connection.recv(1)
"""


def systemctl(*arguments: str) -> None:
    subprocess.run(["systemctl", *arguments], check=True)


@pytest.fixture
def daemon(hook_set: str) -> Iterator[Daemon]:
    """One that was there before the listener."""
    with Daemon(None, hook_set, so_peercred=False) as daemon:
        yield daemon


@pytest.fixture
def waiting(daemon: Daemon) -> Iterator[None]:
    """Systemd listens for a service of games's, that does not run yet."""
    name = f"peercreddtest{uuid4().hex[:12]}"
    program = UNITS / f"{name}.py"
    files = {
        program: PROGRAM,
        UNITS / f"{name}.socket": "[Socket]\nListenStream={}:{}\n".format(*TARGET),
        UNITS / f"{name}.service": (
            f"[Service]\nUser=games\nGroup=games\nExecStart={PYTHON} {program}\n"
        ),
    }
    for file, text in files.items():
        file.write_text(text)
    systemctl("daemon-reload")
    try:
        systemctl("start", f"{name}.socket")
        yield
        systemctl("stop", f"{name}.socket", f"{name}.service")
    finally:
        for file in files:
            file.unlink()
        systemctl("daemon-reload")


@pytest.mark.usefixtures("waiting")
def test_systemd_has_listened_and_the_service_accepts_as_itself(daemon: Daemon) -> None:
    with (
        daemon.client() as asking,
        Origin(None) as origin,
        Stage(origin, asking, alone=False) as stage,
    ):
        client = stage.actor(ALICE)
        fd = client(steps.sockets, V4).tcp
        client(steps.connect_one, fd, TARGET)
        service = int(client(os.read, fd, 20))

        at_client = stage.answer(client, fd)
        local, remote = client(steps.names, fd)
        with client.borrow(fd) as sock:
            netns_cookie = oracle.cookie(sock, oracle.SO_NETNS_COOKIE)
        at_server = asking.lookup_tuple(remote, local, netns_cookie)
        # For an internet socket process 1 has a helper, a moment long, in the unit's cgroup.
        assert at_client.uid == 0
        assert at_client.pid not in (service, client.pid)
        assert at_client.comm == "(sd-listen)"
        assert (at_server.pid, at_server.uid) == (client.pid, ALICE)
        for answer in (at_client, at_server):
            assert acceptor_of(answer) == told_acceptor(daemon.hook_set, service, GAMES)
        client(os.close, fd)
