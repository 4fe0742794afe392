"""SO_PEERCRED on TCP for systemd units: they stop and start, and are answered when they run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from harness.cgroup import Cgroup, mount_point
from harness.opted_in import SETTLE_SECONDS, Place
from peercredd import pins

pytestmark = [pytest.mark.kernel, pytest.mark.systemd]

UNITS = Path("/run/systemd/system")

# Writes what SO_PEERCRED says of its own connection each time it is told to, and whether that is
# the truth.
PROGRAM = """
import os, socket, struct, sys
while True:
    with open(sys.argv[1]) as questions:
        questions.read()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()):
            with listener.accept()[0] as accepted:
                answer = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    known = struct.unpack("iII", answer) == (os.getpid(), os.geteuid(), os.getegid())
    with open(sys.argv[2], "w") as answers:
        answers.write(str(known))
"""


def systemctl(*arguments: str) -> None:
    subprocess.run(["systemctl", *arguments], check=True)


class Service:
    """A unit in a slice of its own, which is all that is captured."""

    def __init__(self, folder: Path) -> None:
        # No dash: systemd would put the slice into another one.
        number = uuid4().hex[:12]
        self.slice = f"peercreddtest{number}.slice"
        self.name = f"peercreddtest{number}.service"
        self._file = UNITS / self.name
        self._questions, self._answers = folder / "questions", folder / "answers"
        os.mkfifo(self._questions)
        os.mkfifo(self._answers)
        program = folder / "program.py"
        program.write_text(PROGRAM)
        self._file.write_text(
            textwrap.dedent(
                f"""
                [Service]
                Slice={self.slice}
                Type=exec
                ExecStart={sys.executable} {program} {self._questions} {self._answers}
                """
            )
        )
        systemctl("daemon-reload")
        systemctl("start", self.slice)
        self.covered = Cgroup.__new__(Cgroup)
        self.covered.path = mount_point() / self.slice

    def knows_its_peer(self) -> bool:
        """Ask the running service to ask."""
        self._questions.write_text("?\n")
        return self._answers.read_text() == "True"

    def close(self) -> None:
        systemctl("stop", self.name, self.slice)
        self._file.unlink()
        systemctl("daemon-reload")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.close()


@pytest.fixture
def place(service: Service, hook_set: str, tmp_path: Path) -> Iterator[Place]:
    place = Place(service.covered, hook_set, tmp_path)
    yield place
    if place.pin_dir.exists():
        pins.remove(place.pin_dir)


def test_a_unit_that_does_not_run_yet_is_waited_for_and_every_start_of_it_is_answered(
    place: Place, service: Service
) -> None:
    with place.daemon("--so-peercred", service.name) as daemon, daemon.client() as client:
        (waiting,) = client.status().so_peercred
        assert (waiting.waiting, waiting.detail) == (True, "it does not run")
        for action in ("start", "restart"):
            systemctl(action, service.name)
            place.wait_until(daemon, service.name, attached=True)
            assert_answered(service)
        systemctl("stop", service.name)
        place.wait_until(daemon, service.name, attached=False)
        systemctl("start", service.name)
        place.wait_until(daemon, service.name, attached=True)
        assert_answered(service)


def assert_answered(service: Service) -> None:
    # A restart takes the old cgroup away a moment before it makes the new one.
    deadline = time.monotonic() + SETTLE_SECONDS
    while not service.knows_its_peer():
        assert time.monotonic() < deadline


def test_a_unit_can_be_enabled_while_it_runs_and_no_other(place: Place, service: Service) -> None:
    with place.daemon() as daemon:
        assert place.refusal("enable", service.name).startswith(
            f"{service.name}: it does not run; `systemctl start {service.name}`"
        )
        missing = f"no{service.name}"
        assert place.refusal("enable", missing).startswith(
            # Where it would be is outside of the capture.
            f"{missing} ({mount_point()}/system.slice/{missing}) is outside of the captured cgroup"
        )
        assert not place.state.exists()

        systemctl("start", service.name)
        assert not service.knows_its_peer()
        assert place.command("enable", service.name).returncode == 0
        assert service.knows_its_peer()
        assert place.listed() == {service.name: ("enabled", True)}

        systemctl("restart", service.name)
        place.wait_until(daemon, service.name, attached=True)
        assert_answered(service)

        assert place.command("disable", service.name).returncode == 0
        assert not service.knows_its_peer()


def test_a_slice_is_a_target_too(place: Place, service: Service) -> None:
    with place.daemon("--so-peercred", service.slice):
        systemctl("start", service.name)
        assert service.knows_its_peer()
