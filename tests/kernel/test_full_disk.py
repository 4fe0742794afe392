"""A disk that is full, wherever the daemon writes: below /run, below /var/lib, in /tmp."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

import peercred
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.patience import patient
from peercredd import pins

pytestmark = pytest.mark.kernel


class Disk:
    """A file system of a test's own, of a few files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fillers: list[Path] = []

    def fill(self) -> None:
        """Leave no byte, and no room for another file."""
        with suppress(OSError), (self.path / "filler").open("wb") as filler:
            while True:
                filler.write(bytes(4096))
        with suppress(OSError):
            while True:
                folder = self.path / f"filler-{uuid4()}"
                folder.mkdir()
                self._fillers.append(folder)

    def make_room(self) -> None:
        """Take back what `fill` did."""
        (self.path / "filler").unlink()
        while self._fillers:
            self._fillers.pop().rmdir()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=32", "tmpfs", path], check=True
    )
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def pin_dir() -> Iterator[Path]:
    path = Path(f"/sys/fs/bpf/peercredd-test-{uuid4().hex[:12]}")
    yield path
    if path.exists():
        pins.remove(path)


class OnDisk(Daemon):
    """A daemon that keeps its socket, and what is enabled, on a disk."""

    def __init__(self, disk: Disk, cgroup: Cgroup, hook_set: str, pin_dir: Path) -> None:
        self.state = disk.path / "lib" / "so_peercred.json"
        path = disk.path / "run" / "peercredd.sock"
        places = ("--socket", str(path), "--so-peercred-state", str(self.state))
        super().__init__(cgroup, hook_set, *places, pin_dir=pin_dir, so_peercred=False)
        self.address = f"unix:{path}"

    def so_peercred(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command of that name."""
        about = ("--pin-dir", str(self.pin_dir), "--so-peercred-state", str(self.state))
        command = [sys.executable, "-m", "peercredd", *about, "so-peercred", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_start_that_needs_room_fails_in_one_line_and_leaves_nothing(
    disk: Disk, cgroup: Cgroup, hook_set: str, pin_dir: Path
) -> None:
    disk.fill()
    before = sorted(disk.path.iterdir())

    with pytest.raises(RuntimeError, match="No space left on device; mend that") as failed:
        OnDisk(disk, cgroup, hook_set, pin_dir)

    assert "Traceback" not in str(failed.value)
    assert not pin_dir.exists()
    assert sorted(disk.path.iterdir()) == before


def test_answers_go_on_and_what_is_enabled_stays_as_it_was(
    disk: Disk, cgroup: Cgroup, hook_set: str, pin_dir: Path
) -> None:
    daemon = OnDisk(disk, cgroup, hook_set, pin_dir)
    with (
        daemon,
        Cgroup(cgroup) as one,
        Cgroup(cgroup) as another,
        daemon.client() as client,
    ):
        assert daemon.so_peercred("enable", str(one.path)).returncode == 0
        disk.fill()

        refused = daemon.so_peercred("enable", str(another.path))

        assert (refused.returncode, refused.stdout) == (1, "")
        (line,) = refused.stderr.splitlines()
        assert f"{daemon.state} cannot be written: No space left on device; mend that" in line
        listed = daemon.so_peercred("list").stdout
        assert str(one.path) in listed
        assert str(another.path) not in listed
        with pytest.raises(peercred.NotFound):
            client.lookup_cookie(1)
        assert client.status().problems == ()
        disk.make_room()
        assert daemon.so_peercred("enable", str(another.path)).returncode == 0


def test_a_server_that_dies_meanwhile_is_replaced_as_soon_as_there_is_room(
    disk: Disk, cgroup: Cgroup, hook_set: str, pin_dir: Path
) -> None:
    with OnDisk(disk, cgroup, hook_set, pin_dir) as daemon:
        with daemon.client() as client:
            server = client.status().server_pid
        disk.fill()
        os.kill(server, signal.SIGKILL)
        wait_for_log("No space left on device", daemon)
        daemon.wait_for_status("No space left on device")
        with daemon.client() as client, pytest.raises(peercred.Unavailable):
            client.status()

        disk.make_room()
        daemon.wait_for_status("STATUS=serving")
        with daemon.client() as client:
            assert client.status().server_pid != server


def wait_for_log(text: str, daemon: Daemon) -> None:
    deadline = time.monotonic() + patient(60)
    while text not in daemon.log():
        assert time.monotonic() < deadline, daemon.log()
        os.sched_yield()


def test_programs_are_compiled_and_loaded_without_any_room_for_temporary_files(
    hook_set: str, tmp_path: Path
) -> None:
    full = "mount -t tmpfs -o size=4k,nr_inodes=1 tmpfs"
    folders = [folder for folder in ("/tmp", "/var/tmp", "/usr/tmp") if Path(folder).is_dir()]
    command = " && ".join([*(f"{full} {folder}" for folder in folders), 'cd /proc && exec "$@"'])
    python = [sys.executable, "-m", "peercredd.loader", "--dry-run", hook_set, "no-parent"]
    environment = os.environ | {"TMPDIR": "/proc"}

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", *python],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
