"""Where one daemon follows another."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

from harness import programs
from harness.cgroup import Cgroup
from harness.daemon import CACHE, Daemon
from peercredd import defaults, pins
from peercredd.hooks import PROGRAMS


class Place:
    """Where captures of one test's own come and go: the same cgroup, pins and settings.

    `tree` is that of another version, for what is to run that one.
    """

    def __init__(self, cgroup: Cgroup, hook_set: str) -> None:
        self.cgroup = cgroup
        self.pin_dir = Path(f"/sys/fs/bpf/peercredd-test-{uuid4().hex[:12]}")
        self.links = self.pin_dir / pins.CAPTURE / pins.LINKS
        self.hook_set = hook_set
        self.programs = [program.name for program in PROGRAMS[hook_set]]
        # What tells this place's programs from those that others attach meanwhile.
        self.table_size = random.randrange(1025, 16384)
        self.settings = {
            "pin_dir": str(self.pin_dir),
            "cache_dir": os.environ[CACHE],
            "cgroup": str(cgroup.path),
            "hooks": hook_set,
            "max_connections": self.table_size,
            "max_pending": self.table_size,
            "max_percent_per_user": defaults.MAX_PERCENT_PER_USER,
        }

    def daemon(self, *options: str, tree: Path | None = None) -> Daemon:
        """A daemon that is there until it is closed."""
        sizes = (f"--max-connections={self.table_size}", f"--max-pending={self.table_size}")
        return Daemon(self.cgroup, self.hook_set, *sizes, *options, pin_dir=self.pin_dir, tree=tree)

    def load(self, **settings: object) -> subprocess.CompletedProcess[str]:
        """Run a loader; the caller holds the pin directory."""
        return subprocess.run(
            [
                *(sys.executable, "-m", "peercredd.loader"),
                *(json.dumps({**self.settings, **settings}), str(os.getpid())),
            ],
            check=False,
            capture_output=True,
            text=True,
        )

    def unload(self) -> None:
        """Have the daemon's program end the capture that nobody holds."""
        command = [sys.executable, "-m", "peercredd", "--pin-dir", str(self.pin_dir), "unload"]
        subprocess.run(command, check=True)

    def assert_attached_once(self, besides: int = 1) -> None:
        """Each program of the hook set, and what answers SO_PEERCRED: a daemon attaches that."""
        programs.wait_until_attached(self.table_size, len(self.programs) + besides)

    def assert_nothing_attached(self) -> None:
        """Raises AssertionError if something is."""
        programs.wait_until_attached(self.table_size, 0)
