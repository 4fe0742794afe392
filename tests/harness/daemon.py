"""A real daemon on a cgroup of the tests' own."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import closing
from pathlib import Path
from types import TracebackType

import peercred
from harness.cgroup import Cgroup
from harness.netns import NetworkNamespace
from harness.patience import CALL_SECONDS, patient
from harness.requirements import CAPTURE_THE_HOST
from peercredd import pins
from peercredd.libbpf import Map

RECORD_TABLES = ("pending", "connections", "by_tuple", "by_client")
"""What must be empty when no socket is left."""

START_SECONDS = patient(60)
STOP_SECONDS = patient(30)
EMPTY_SECONDS = patient(10)
LOOK_SECONDS = 0.01
_NEVER = "86400"

CACHE = "PEERCREDD_TEST_CACHE"
"""In the environment: the folder in which daemons find what earlier ones have compiled."""


class Client(peercred.Client):
    """A client of a daemon whose tables can be looked at."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon.address, timeout=CALL_SECONDS)
        self.pin_dir = daemon.pin_dir


class Daemon:
    """A `peercredd` process; its capture covers `cgroup` and nothing else.

    Without a cgroup it covers the host: see CAPTURE_THE_HOST.

    With a `tcp_port` it serves on loopback TCP too, in its `namespace` if it gets one; and it is
    in the cgroup itself, or it would not know its callers.

    It is this version, or the one that is in `tree`.

    Captured sockets answer getsockopt(SO_PEERCRED) too, unless `so_peercred` is false.

    Unless options say otherwise it does not sweep: what a test leaves in a table was
    not retired, and stays to be seen.
    """

    def __init__(
        self,
        cgroup: Cgroup | None,
        hook_set: str,
        *options: str,
        pin_dir: Path | None = None,
        so_peercred: bool = True,
        tcp_port: int = 0,
        namespace: NetworkNamespace | None = None,
        tree: Path | None = None,
    ) -> None:
        assert cgroup or hook_set in CAPTURE_THE_HOST
        self.hook_set = hook_set
        self._folder = tempfile.TemporaryDirectory(prefix="peercredd-test-")
        folder = Path(self._folder.name)
        self.socket = folder / "run" / "peercredd.sock"
        self.address = f"unix:{self.socket}"
        self.pin_dir = pin_dir or Path(f"/sys/fs/bpf/peercredd-test-{uuid.uuid4().hex[:12]}")
        self._owns_pins = pin_dir is None
        self._log = folder / "log"
        self._last_words = ""
        configuration = folder / "peercredd.toml"
        configuration.touch()
        self._notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notifications.bind(str(folder / "notify"))
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    # Should the tests be killed, the daemon does not outlive them.
                    *("setpriv", "--pdeathsig", "TERM", "--"),
                    *(_in_cgroup(cgroup) if cgroup and tcp_port else ()),
                    *(("nsenter", f"--net=/proc/self/fd/{namespace.fd}") if namespace else ()),
                    *(sys.executable, "-m", "peercredd"),
                    *("--config", str(configuration)),
                    *("--cgroup", str(cgroup.path) if cgroup else "root"),
                    *("--hooks", hook_set),
                    *("--pin-dir", str(self.pin_dir)),
                    *("--cache-dir", os.environ[CACHE]),
                    *("--socket", str(self.socket)),
                    *(("--tcp-port", str(tcp_port)) if tcp_port else ("--no-tcp",)),
                    *("--group", "root", "--user", "nobody"),
                    *("--sweep-interval-seconds", _NEVER),
                    *("--so-peercred-state", str(folder / "so_peercred.json")),
                    *(("--so-peercred", "all") if so_peercred else ()),
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(tree) | {"NOTIFY_SOCKET": str(folder / "notify")},
                pass_fds=[namespace.fd] if namespace else [],
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            self._unload()
            raise

    def client(self) -> Client:
        """A new client of this daemon."""
        return Client(self)

    def wait_for_status(self, text: str) -> None:
        """Wait until systemd, had it started this daemon, would show that in its status."""
        self._notifications.settimeout(patient(60))
        while text.encode() not in self._notifications.recv(1024):
            pass

    def log(self) -> str:
        """What the daemon has written so far."""
        if self._log.exists():
            self._last_words = self._log.read_text(errors="backslashreplace")
        return self._last_words

    def kill(self) -> None:
        """End the daemon with SIGKILL: its capture stays."""
        self.process.kill()
        self.process.wait()
        self._forget()

    def close(self, *, keeps: bool = False) -> None:
        """Stop the daemon with SIGTERM; raises AssertionError unless it ends cleanly.

        One that `keeps` its capture leaves its pins.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_SECONDS)
            assert status == 0, f"peercredd ended with {status}:\n{self.log()}"
            assert self.pin_dir.exists() == keeps, f"{self.pin_dir} at its end:\n{self.log()}"
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._unload()
            self._forget()

    def _forget(self) -> None:
        self.log()
        self._notifications.close()
        self._folder.cleanup()

    def _unload(self) -> None:
        """Take away what a daemon that failed has left; pins that were given are the giver's."""
        if self._owns_pins and self.pin_dir.exists():
            unload = ["--pin-dir", str(self.pin_dir), "unload"]
            subprocess.run([sys.executable, "-m", "peercredd", *unload], check=True)

    def _wait_until_ready(self) -> None:
        """Wait until the daemon says that it serves, as it does to systemd."""
        with os.fdopen(os.pidfd_open(self.process.pid)) as process:
            changes = select.poll()
            changes.register(self._notifications, select.POLLIN)
            changes.register(process, select.POLLIN)
            changed = [fd for fd, _ in changes.poll(START_SECONDS * 1000)]
        if self._notifications.fileno() not in changed:
            raise RuntimeError(f"peercredd does not serve:\n{self.log()}")

    def __enter__(self) -> Daemon:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _environment(tree: Path | None) -> dict[str, str]:
    if tree is None:
        return dict(os.environ)
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(tree)}


def _in_cgroup(cgroup: Cgroup) -> list[str]:
    """The words of a command that puts what comes behind into a cgroup."""
    return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.path / "cgroup.procs")]


def open_map(of: Daemon | Client, name: str, *, writable: bool = False) -> Map:
    """One of the capture's maps; close it."""
    return Map.open(of.pin_dir / pins.CAPTURE / pins.MAPS / name, writable=writable)


def occupancy(client: Client) -> dict[str, int]:
    """How many records each table holds.

    As the kernel has it: to ask the daemon for that again and again is what an emulated machine
    would do most.
    """
    entries = {}
    for name in RECORD_TABLES:
        with closing(open_map(client, name)) as table:
            entries[name] = table.count()
    return entries


def wait_until_empty(client: Client, but: dict[str, int] | None = None) -> None:
    """Wait until no record is left; raises AssertionError that says which tables have some.

    `but` is what others have left before. Sockets are closed before the process that
    held them ends, but a RST on its way, or what the kernel closes in a worker of its
    own, may take some moments more.
    """
    deadline = time.monotonic() + EMPTY_SECONDS
    allowed = but or dict.fromkeys(RECORD_TABLES, 0)
    while any((left := occupancy(client))[name] > allowed[name] for name in RECORD_TABLES):
        assert time.monotonic() < deadline, f"records are left that nobody can ask for: {left}"
        # Who looks without a pause keeps a sweep in this process from running (the GIL).
        time.sleep(LOOK_SECONDS)


def drops(client: peercred.Client) -> dict[str, int]:
    """The reasons for which something was not recorded, and how often."""
    return {drop.reason: drop.count for drop in client.status().drops if drop.count}
