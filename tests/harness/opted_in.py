"""A daemon that says where SO_PEERCRED on TCP works, and the commands beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.patience import patient
from peercredd import about, pins
from peercredd.so_peercred import OptIn

SETTLE_SECONDS = patient(30)


class Place:
    """Where daemons of one test's own come and go; nothing is enabled but what it says."""

    def __init__(self, cgroup: Cgroup, hook_set: str, folder: Path) -> None:
        self.cgroup = cgroup
        self.hook_set = hook_set
        self.pin_dir = Path(f"/sys/fs/bpf/peercredd-test-{uuid4().hex[:12]}")
        self.state = folder / "state" / "so_peercred.json"
        self.configuration = folder / "peercredd.toml"
        self.configure()

    def configure(self, *targets: Path) -> None:
        """Write what the commands read; the daemon is given all by flags."""
        cgroups = json.dumps([str(target) for target in targets])
        self.configuration.write_text(
            f"""
            capture.pin_dir = "{self.pin_dir}"
            so_peercred.state = "{self.state}"
            so_peercred.cgroups = {cgroups}
            """
        )

    @contextmanager
    def daemon(self, *options: str) -> Iterator[Daemon]:
        """Run a daemon; unless the block ends it, it is stopped."""
        daemon = Daemon(
            self.cgroup,
            self.hook_set,
            *("--so-peercred-state", str(self.state)),
            *options,
            pin_dir=self.pin_dir,
            so_peercred=False,
        )
        try:
            yield daemon
            if daemon.process.poll() is None:
                daemon.close(keeps="--keep" in options)
        finally:
            daemon.kill()
            print(daemon.log())

    def keep_a_capture(self) -> None:
        """Have a capture, and no daemon."""
        with self.daemon("--keep"):
            pass

    def command(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run ``peercredd so-peercred``."""
        return subprocess.run(
            [
                *(sys.executable, "-m", "peercredd", "--config", self.configuration),
                *("so-peercred", *arguments),
            ],
            check=False,
            capture_output=True,
            text=True,
        )

    def run(self, *command: str) -> list[str]:
        """The words of ``peercred run`` with this daemon's configuration."""
        own = [sys.executable, "-m", "peercred", "run", "--config", str(self.configuration)]
        return [*own, "--", *command]

    def refusal(self, *arguments: str | Path) -> str:
        """What a command that fails says in its one line."""
        done = self.command(*arguments)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert done.stderr.startswith("peercredd: ")
        assert done.stderr.count("\n") == 1
        return done.stderr.removeprefix("peercredd: ").removesuffix("\n")

    def listed(self) -> dict[str, tuple[str, bool]]:
        """By target: who asked, and whether it is attached, as ``list`` says."""
        done = self.command("list", "--json")
        assert done.returncode == 0, done
        rows = json.loads(done.stdout)["so_peercred"]
        return {row["target"]: (row["source"], row["attached"]) for row in rows}

    def opt_in(self, *configured: str | Path) -> OptIn:
        """What is asked for and attached, in this process."""
        running = pins.capture(self.pin_dir)
        why_not = about.read(running / pins.MAPS)["so_peercred"] if running else ""
        targets = [str(target) for target in configured]
        return OptIn(self.pin_dir, self.state, targets, self.cgroup.path, why_not)

    def wait_until(self, daemon: Daemon, target: Path | str, *, attached: bool) -> None:
        """Wait until the daemon has seen a change; raises AssertionError."""
        deadline = time.monotonic() + SETTLE_SECONDS
        with daemon.client() as client:
            while not any(
                each.target == str(target) and each.attached == attached
                for each in client.status().so_peercred
            ):
                assert time.monotonic() < deadline, daemon.log()
                os.sched_yield()
