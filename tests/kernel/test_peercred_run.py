"""``peercred run``: the command's first instruction to the last trace of its cgroup."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.cgroup import Cgroup
from harness.opted_in import SETTLE_SECONDS, Place
from peercredd import pins

# What is attached, and where, has nothing to do with the hook set; and a virtual machine is slow.
pytestmark = [pytest.mark.kernel, pytest.mark.hook_sets("cgroup")]

JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'

# Says what SO_PEERCRED tells of its own connection, and then which signals come, until its input
# ends. By a descriptor: one that comes just before a read() would not end it.
SERVER = """
import os, select, signal, socket, struct
signals, theirs = socket.socketpair()
theirs.setblocking(False)
signal.set_wakeup_fd(theirs.fileno())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
with socket.create_server(("127.0.0.1", 0)) as listener:
    with socket.create_connection(listener.getsockname()):
        with listener.accept()[0] as accepted:
            answer = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
known = struct.unpack("iII", answer) == (os.getpid(), os.geteuid(), os.getegid())
print(known, flush=True)
while 0 not in (ready := select.select([0, signals], [], [])[0]) or os.read(0, 1):
    if signals in ready:
        for number in signals.recv(100):
            print("signal", number, flush=True)
"""


@pytest.fixture
def place(hook_set: str, tmp_path: Path) -> Iterator[Place]:
    with Cgroup() as cgroup:
        place = Place(cgroup, hook_set, tmp_path)
        yield place
        if place.pin_dir.exists():
            pins.remove(place.pin_dir)


def run(place: Place, *command: str, cgroup: Cgroup | None = None) -> list[str]:
    """The words that run a command in the captured cgroup."""
    inside = str((cgroup or place.cgroup).path)
    return ["sh", "-c", JOIN, inside, *place.run(*command)]


def finish(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def assert_cleared_away(place: Place) -> None:
    assert [entry.name for entry in place.cgroup.path.iterdir() if entry.is_dir()] == []
    folder = place.pin_dir / pins.CAPTURE / pins.SO_PEERCRED
    assert not folder.exists() or list(folder.iterdir()) == []


@contextmanager
def serving(place: Place) -> Iterator[subprocess.Popen[str]]:
    """A server that has said that it knows its peer."""
    with subprocess.Popen(
        run(place, sys.executable, "-c", SERVER),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        yield process


def test_the_command_gets_its_peers_from_so_peercred(place: Place) -> None:
    with place.daemon():
        with serving(place) as process:
            rows = place.listed()
            (path,) = rows
            assert rows[path] == ("transient", True)
            assert Path(path).parent == place.cgroup.path
            assert process.stdin
            process.stdin.close()
            assert process.wait() == 0
        assert_cleared_away(place)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("true",), 0),
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -KILL $$"), 128 + 9),
        (("sh", "-c", "kill -TERM $$"), 128 + 15),
        (("/nonexistent/command",), 127),
        (("/etc/hostname",), 126),
    ],
)
def test_it_exits_as_the_command_does(place: Place, command: tuple[str, ...], status: int) -> None:
    place.keep_a_capture()

    done = finish(run(place, *command))

    assert done.returncode == status
    assert len(done.stderr.splitlines()) == (status in (126, 127))
    assert_cleared_away(place)


def test_the_commands_own_options_are_its_own(place: Place) -> None:
    place.keep_a_capture()

    done = finish(run(place, "echo", "--json", "--", "--config"))

    assert (done.returncode, done.stdout) == (0, "--json -- --config\n")


def test_signals_are_passed_on_and_the_command_decides(place: Place) -> None:
    with place.daemon():
        with serving(place) as process:
            assert process.stdin
            assert process.stdout
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                process.send_signal(number)
                assert process.stdout.readline() == f"signal {number}\n"
            process.stdin.close()
            assert process.wait() == 0
        assert_cleared_away(place)


def test_what_the_command_leaves_running_and_made_goes_with_it(place: Place) -> None:
    place.keep_a_capture()
    script = """
        own=$(sed -n 's/^0:://p' /proc/self/cgroup)
        mount=$(awk '/ - cgroup2 / { print $5; exit }' /proc/self/mountinfo)
        mkdir "$mount$own/inner"
        sleep 1000 > /dev/null 2>&1 &
        echo $!
    """

    done = finish(run(place, "sh", "-c", script))

    assert done.returncode == 0
    # Whether it has been waited for or not: a process that has ended runs no program.
    assert not Path(f"/proc/{int(done.stdout)}/exe").exists()
    assert_cleared_away(place)


def test_killed_it_takes_the_command_and_its_cgroup_along(place: Place) -> None:
    with place.daemon():
        with serving(place) as process:
            (path,) = place.listed()
            (pid,) = (int(line) for line in Path(path, "cgroup.procs").read_text().split())
            command = os.pidfd_open(pid)
            process.kill()
        with os.fdopen(command):
            ended = select.poll()
            ended.register(command, select.POLLIN)
            assert ended.poll(SETTLE_SECONDS * 1000)
        deadline = time.monotonic() + SETTLE_SECONDS
        while Path(path).exists():
            assert time.monotonic() < deadline
            os.sched_yield()
        assert_cleared_away(place)


def test_a_capture_that_ends_meanwhile_does_not_hide_the_commands_status(place: Place) -> None:
    with place.daemon() as daemon, serving(place) as process:
        daemon.close()
        assert process.stdin
        process.stdin.close()
        assert process.wait() == 0
    assert_cleared_away(place)


def test_without_a_capture_one_line_says_so_and_the_command_does_not_run(place: Place) -> None:
    done = finish(run(place, "echo", "it runs"))

    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == (
        f"peercred: no capture runs in {place.pin_dir}; start the daemon, or name its --pin-dir\n"
    )
    assert_cleared_away(place)


def test_where_nothing_is_captured_one_line_says_so_and_the_command_does_not_run(
    place: Place,
) -> None:
    with place.daemon(), Cgroup() as outside:
        done = finish(run(place, "echo", "it runs", cgroup=outside))

        assert (done.returncode, done.stdout) == (125, "")
        assert done.stderr.startswith(f"peercred: {outside.path}/peercred-run-")
        assert f"is outside of the captured cgroup {place.cgroup.path}; " in done.stderr
        assert done.stderr.count("\n") == 1


def test_without_root_one_line_says_so() -> None:
    # Root until all is imported: another user may not be allowed to read this tree.
    script = "import os; from peercred.cli.main import main; os.setresuid(1, 1, 1); main()"

    done = finish([sys.executable, "-c", script, "run", "true"])

    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == (
        "peercred: only root can make a cgroup and attach to it; run it with sudo\n"
    )
