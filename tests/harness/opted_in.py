"""A daemon whose configuration says where SO_PEERCRED on TCP works, and its commands."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import peercred
from harness.cgroup import Cgroup
from harness.daemon import START_SECONDS, STOP_SECONDS
from harness.patience import CALL_SECONDS, patient
from peercredd import loader, pins
from peercredd.so_peercred import OptIn

SETTLE_SECONDS = patient(30)


class Place:
    """Where daemons of one test's own come and go; nothing is enabled but what it says."""

    def __init__(self, cgroup: Cgroup, hook_set: str, folder: Path) -> None:
        self.cgroup = cgroup
        self.pin_dir = Path(f"/sys/fs/bpf/peercredd-test-{uuid4().hex[:12]}")
        self.state = folder / "state" / "so_peercred.json"
        self.configuration = folder / "peercredd.toml"
        self.log = folder / "log"
        self._address = f"unix:{folder}/sock"
        self._notify = folder / "notify"
        self.configuration.write_text(
            f"""
            [capture]
            cgroup = "{cgroup.path}"
            hooks = "{hook_set}"
            pin_dir = "{self.pin_dir}"
            max_connections = 1000
            max_pending = 1000
            [api]
            socket = "{folder}/sock"
            group = "root"
            [so_peercred]
            state = "{self.state}"
            [sweep]
            interval_seconds = 86400
            """
        )

    @contextmanager
    def daemon(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a daemon; unless the block ends it, it is stopped with SIGTERM."""
        self._notify.unlink(missing_ok=True)
        with (
            self.log.open("wb") as log,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications,
        ):
            notifications.bind(str(self._notify))
            process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "TERM", "--"),
                    *(sys.executable, "-m", "peercredd"),
                    *("--config", str(self.configuration), *options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"NOTIFY_SOCKET": str(self._notify)},
            )
            try:
                self._wait_until_ready(process, notifications)
                yield process
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(STOP_SECONDS) == 0, self.log.read_text()
            finally:
                process.kill()
                process.wait()

    def _wait_until_ready(
        self, process: subprocess.Popen[bytes], notifications: socket.socket
    ) -> None:
        with os.fdopen(os.pidfd_open(process.pid)) as ended:
            changes = select.poll()
            changes.register(notifications, select.POLLIN)
            changes.register(ended, select.POLLIN)
            changed = [fd for fd, _ in changes.poll(START_SECONDS * 1000)]
        assert notifications.fileno() in changed, self.log.read_text()

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
        why_not = loader.read_about(running / pins.MAPS)["so_peercred"] if running else ""
        targets = [str(target) for target in configured]
        return OptIn(self.pin_dir, self.state, targets, self.cgroup.path, why_not)

    def client(self) -> peercred.Client:
        """A new client of the daemon that runs."""
        return peercred.Client(self._address, timeout=CALL_SECONDS)

    def wait_until(self, target: str | Path, *, attached: bool) -> None:
        """Wait until the daemon has seen a change; raises AssertionError."""
        deadline = time.monotonic() + SETTLE_SECONDS
        with self.client() as client:
            while not any(
                each.target == str(target) and each.attached == attached
                for each in client.status().so_peercred
            ):
                assert time.monotonic() < deadline, self.log.read_text()
                os.sched_yield()
