"""A cgroup v2 folder of the tests' own."""

from __future__ import annotations

import os
import select
import uuid
from pathlib import Path
from types import TracebackType

from harness.patience import patient

WAIT_SECONDS = patient(30)


def mount_point() -> Path:
    """Where cgroup v2 is mounted; raises FileNotFoundError."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        if filesystem.split()[0] == "cgroup2":
            return Path(mount.split()[4])
    raise FileNotFoundError("no cgroup2 in /proc/self/mountinfo: mount -t cgroup2 none DIR")


class Cgroup:
    """A folder in another, or in the root, removed with all that lives in it."""

    def __init__(self, above: Cgroup | None = None) -> None:
        folder = above.path if above else mount_point()
        self.path: Path = folder / f"peercredd-test-{uuid.uuid4().hex[:12]}"
        self.path.mkdir()

    def add(self, pid: int) -> None:
        """Move a process here. Sockets it has already made stay where they were made."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Kill the members, wait until they are gone, remove the folder."""
        (self.path / "cgroup.kill").write_text("1")
        self._wait_until_empty()
        self.path.rmdir()

    def _wait_until_empty(self) -> None:
        with open(self.path / "cgroup.events", "rb", buffering=0) as events:
            changes = select.poll()
            changes.register(events, select.POLLPRI)
            while b"populated 1" in os.pread(events.fileno(), 4096, 0):
                if not changes.poll(WAIT_SECONDS * 1000):
                    members = (self.path / "cgroup.procs").read_text().split()
                    raise TimeoutError(f"{self.path}: still alive after SIGKILL: {members}")

    def __enter__(self) -> Cgroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
