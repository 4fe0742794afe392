"""The daemon's process: how it starts, what it tells, how it ends."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

import peercred
from harness.cgroup import Cgroup
from harness.daemon import CACHE
from harness.patience import CALL_SECONDS, patient
from peercredd import pins
from peercredd.hooks import HOOK_SETS

pytestmark = pytest.mark.kernel

SERVING_LIMIT_KIB = 45 * 1024
SUPERVISOR_LIMIT_KIB = 30 * 1024


OLD_KERNEL = """
import errno, os, sys, seccomp
calls = seccomp.SyscallFilter(seccomp.ALLOW)
SO_NETNS_COOKIE = 71
calls.add_rule(
    seccomp.ERRNO(errno.ENOPROTOOPT), "getsockopt", seccomp.Arg(2, seccomp.EQ, SO_NETNS_COOKIE)
)
calls.load()
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Executes a command as a kernel would run it that is older than 5.14."""


class Process:
    """A daemon whose log is read as it comes."""

    def __init__(self, cgroup: Cgroup, hook_set: str, folder: Path) -> None:
        self.cgroup = cgroup
        self.hook_set = hook_set
        self.folder = folder
        self.pin_dir = Path(f"/sys/fs/bpf/peercredd-test-{uuid4().hex[:12]}")
        self.socket = folder / "peercredd.sock"
        self.address = f"unix:{self.socket}"
        self.options: list[str] = []
        self.environment: dict[str, str] = {}
        self.wrapper: list[str] = []

    def command(self, *arguments: str) -> list[str]:
        configuration = self.folder / "peercredd.toml"
        configuration.touch()
        return [
            *(sys.executable, "-m", "peercredd"),
            *("--config", str(configuration)),
            *("--cgroup", str(self.cgroup.path)),
            *("--hooks", self.hook_set),
            *("--pin-dir", str(self.pin_dir)),
            *("--cache-dir", os.environ[CACHE]),
            *("--socket", str(self.socket)),
            "--no-tcp",
            *("--group", "root", "--user", "nobody"),
            *("--log-format", "json"),
            *self.options,
            *arguments,
        ]

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*self.wrapper, *self.command()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | self.environment,
        )

    def event(self, text: str) -> dict[str, Any]:
        """Wait for an event of the log; raises AssertionError when the log ends first."""
        assert self.process.stderr
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            event: dict[str, Any] = json.loads(line)
            if event["event"] == text:
                return event
        raise AssertionError(f"no event {text!r} in {lines}")

    def end(self, *signals: signal.Signals) -> tuple[int, list[dict[str, Any]]]:
        """Send signals and wait; the exit status and what was logged since."""
        if len(signals) > 1:
            # Stopped, it cannot act on one before the others are there too.
            self.process.send_signal(signal.SIGSTOP)
        for number in signals:
            self.process.send_signal(number)
        self.process.send_signal(signal.SIGCONT)
        _, log = self.process.communicate()
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]

    def loader(self) -> int:
        """Wait until the loader's process is there; a pidfd of it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while self.process.poll() is None:
            for pid in children.read_text().split():
                # A child that was only a fork of another's making may have ended.
                with suppress(FileNotFoundError, ProcessLookupError):
                    if b"peercredd.loader" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return os.pidfd_open(int(pid))
        raise AssertionError(f"ended with {self.process.returncode} before it had a loader")


@pytest.fixture
def process(hook_set: str, tmp_path: Path) -> Iterator[Process]:
    with Cgroup() as cgroup:
        process = Process(cgroup, hook_set, tmp_path)
        yield process
        with process.process:
            process.process.kill()
        if process.pin_dir.exists():
            with pins.hold(process.pin_dir):
                pins.remove(process.pin_dir)


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]


def ended(pidfd: int) -> bool:
    """Wait until a process has ended."""
    with os.fdopen(pidfd):
        end = select.poll()
        end.register(pidfd, select.POLLIN)
        return bool(end.poll(patient(60) * 1000))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(process: Process, number: signal.Signals) -> None:
    process.start()
    process.event("serving")
    assert process.socket.is_socket()

    status, log = process.end(number)

    assert status == 0
    assert [event["event"] for event in log] == ["stopping", "stopped"]
    assert log[0]["signal"] == number.name
    assert not process.socket.exists()
    assert not process.pin_dir.exists()


def test_one_line_says_what_is_served_and_how_long_that_took(process: Process) -> None:
    process.start()

    event = process.event("serving")

    assert event["socket"] == str(process.socket)
    assert event["cgroup"] == str(process.cgroup.path)
    assert event["hooks"] == process.hook_set
    (other,) = {*HOOK_SETS} - {process.hook_set}
    why = f"{process.hook_set} was asked for (--hooks {process.hook_set})"
    assert event["not_in_use"] == {other: why}
    assert event["pins"] == str(process.pin_dir)
    assert event["capture"] == "begun"
    assert event["seconds_to_first_answer"] > 0


def test_it_answers_as_soon_as_it_says_that_it_serves(process: Process) -> None:
    process.start()
    process.event("serving")

    with peercred.Client(process.address, timeout=CALL_SECONDS) as client:
        assert client.status().daemon_pid == process.process.pid


def test_the_second_signal_ends_it_at_once(process: Process) -> None:
    process.start()
    process.event("serving")

    status, log = process.end(signal.SIGTERM, signal.SIGINT)

    assert status == 1
    assert "peercredd unload" in log[-1]["event"]
    assert process.pin_dir.exists()


def test_a_signal_during_the_load_ends_loader_and_daemon_and_leaves_nothing(
    process: Process,
) -> None:
    process.options = ["--log-level", "debug"]
    process.start()
    process.event("loading")
    loader = process.loader()

    status, log = process.end(signal.SIGTERM)

    assert status == 0
    assert "serving" not in [event["event"] for event in log]
    assert ended(loader)
    assert not process.pin_dir.exists()


def test_the_loader_dies_with_a_daemon_that_is_killed(process: Process) -> None:
    process.start()
    loader = process.loader()

    process.process.kill()

    assert ended(loader)
    assert pins.capture(process.pin_dir) is None


def test_a_loader_that_cannot_work_ends_the_start_with_its_reason(
    process: Process, tmp_path: Path
) -> None:
    (tmp_path / "lattices").mkdir()
    (tmp_path / "lattices" / "bcc.py").touch()
    path = os.environ.get("PYTHONPATH", "")
    process.environment = {"PYTHONPATH": f"{tmp_path / 'lattices'}{os.pathsep}{path}"}
    process.start()

    status, log = process.end()

    assert status == 1
    assert [event["level"] for event in log] == ["error"]
    assert re.match("the loader failed: .*python3-bpfcc", log[0]["event"])
    assert not process.pin_dir.exists()


def test_a_socket_in_use_ends_the_start_and_leaves_no_capture(process: Process) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(process.socket))
        other.listen()
        process.start()

        status, log = process.end()

        assert status == 1
        assert len(log) == 1
        assert f"{process.socket}: in use by process {os.getpid()}" in log[0]["event"]
        assert not process.pin_dir.exists()
        assert process.socket.is_socket()


def test_pins_outside_a_bpffs_are_refused(process: Process) -> None:
    process.pin_dir = process.folder / "pins"
    process.start()

    status, log = process.end()

    assert status == 1
    assert "is not on a BPF file system" in log[0]["event"]


def test_a_name_that_no_bpffs_can_have_is_refused(process: Process) -> None:
    process.options = ["--pin-dir", f"{process.pin_dir}.dot"]
    process.start()

    status, log = process.end()

    assert status == 1
    assert "without dots" in log[0]["event"]


def test_a_kernel_that_is_too_old_is_refused_in_one_line_whatever_else_is_wrong(
    process: Process,
) -> None:
    process.wrapper = [sys.executable, "-c", OLD_KERNEL]
    process.options = ["--user", "peercredd-nobody-has-this-name"]
    process.start()

    status, log = process.end()

    assert status == 1
    assert len(log) == 1
    assert "Linux 5.14 or newer is needed" in log[0]["event"]
    assert not process.pin_dir.exists()


def test_a_cgroup_that_is_none_is_refused_before_anything_is_loaded(process: Process) -> None:
    process.options = ["--cgroup", str(process.folder)]
    process.start()

    status, log = process.end()

    assert status == 1
    assert "is no cgroup v2 directory" in log[0]["event"]
    assert not process.pin_dir.exists()


def test_unload_does_not_touch_a_running_daemons_capture(process: Process) -> None:
    process.start()
    process.event("serving")

    unload = subprocess.run(process.command("unload"), capture_output=True, text=True, check=False)

    assert unload.returncode == 1
    assert f"held by process {process.process.pid}" in unload.stderr
    assert pins.capture(process.pin_dir)


def test_unload_says_when_there_is_nothing(process: Process) -> None:
    process.start()
    process.event("serving")
    process.end(signal.SIGTERM)

    unload = subprocess.run(process.command("unload"), capture_output=True, text=True, check=False)

    assert unload.returncode == 0
    assert unload.stdout == f"{process.pin_dir}: nothing to remove\n"
    assert not process.pin_dir.exists()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_when_it_is_ready_and_when_it_stops(
    process: Process, abstract: bool
) -> None:
    name = f"@{uuid4().hex}" if abstract else str(process.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0"))
        process.environment = {"NOTIFY_SOCKET": name}
        process.start()

        assert manager.recv(64) == b"READY=1"
        assert process.socket.is_socket()
        # A child that may speak for the daemon does: systemctl, when it ends.
        (server,) = psutil.Process(process.process.pid).children()
        assert "NOTIFY_SOCKET" not in server.environ()
        process.process.terminate()
        assert manager.recv(64) == b"STOPPING=1"


def test_it_goes_on_when_nobody_listens_for_notifications(process: Process) -> None:
    process.environment = {"NOTIFY_SOCKET": str(process.folder / "none")}
    process.start()
    process.event("serving")

    status, _ = process.end(signal.SIGTERM)

    assert status == 0


def test_it_sweeps_at_intervals(process: Process) -> None:
    process.options = ["--sweep-interval-seconds", "1", "--log-level", "debug"]
    process.start()

    assert process.event("swept")["records_removed"] == 0
    assert process.event("swept")["records_removed"] == 0


def test_a_sweep_that_fails_is_a_warning_and_the_daemon_goes_on(process: Process) -> None:
    process.options = ["--sweep-interval-seconds", "1"]
    process.start()
    process.event("serving")
    maps = process.pin_dir / pins.CAPTURE / pins.MAPS
    (maps / "pending").rename(maps / "moved")
    (maps / "drops").rename(maps / "pending")

    event = process.event("stale records stay for now")

    assert event["level"] == "warning"
    assert event["reason"].startswith("the sweeper failed: ")
    with peercred.Client(process.address, timeout=CALL_SECONDS) as client:
        assert client.status().daemon_pid == process.process.pid
    status, _ = process.end(signal.SIGTERM)
    assert status == 0


def test_a_sweep_that_cannot_be_started_is_a_warning_and_the_daemon_goes_on(
    process: Process,
) -> None:
    process.options = ["--sweep-interval-seconds", "1"]
    process.start()
    process.event("serving")
    pid = process.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, hard))

    event = process.event("stale records stay for now")

    assert "peercredd.sweeper cannot be started: Too many open files" in event["reason"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    with peercred.Client(process.address, timeout=CALL_SECONDS) as client:
        assert client.status().daemon_pid == pid
    status, _ = process.end(signal.SIGTERM)
    assert status == 0


def test_the_serving_process_is_at_most_45_mb_and_its_supervisor_30(process: Process) -> None:
    process.start()
    process.event("serving")
    with peercred.Client(process.address, timeout=patient(60)) as client:
        client.lookup_many([(("127.0.0.1", 1), ("127.0.0.1", port)) for port in range(1, 3001)])
        list(client.connections())
        server = client.status().server_pid

    assert resident_kib(server) <= SERVING_LIMIT_KIB
    assert resident_kib(process.process.pid) <= SUPERVISOR_LIMIT_KIB


def test_the_serving_process_has_no_compiler_in_memory(process: Process) -> None:
    process.start()
    server = process.event("serving")["server_pid"]

    for pid in (server, process.process.pid):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "libbpf" in maps
        assert "LLVM" not in maps
        assert "libbcc" not in maps


def test_only_the_server_has_grpc_in_memory(process: Process) -> None:
    process.start()
    server = process.event("serving")["server_pid"]

    assert "cygrpc" in Path(f"/proc/{server}/maps").read_text()
    assert "cygrpc" not in Path(f"/proc/{process.process.pid}/maps").read_text()


def test_check_finds_this_machine_fit(process: Process) -> None:
    done = subprocess.run(
        process.command("check", "--json"), capture_output=True, text=True, check=False
    )
    process.process = subprocess.Popen(["true"], stderr=subprocess.PIPE)

    not_ok = {
        check["name"]: check["outcome"]
        for check in json.loads(done.stdout)["checks"]
        if check["outcome"] != "ok"
    }
    assert not_ok == {
        f"{name} loadable": "unused" for name in HOOK_SETS if name != process.hook_set
    }
    assert done.returncode == 0
    assert not process.pin_dir.exists()
