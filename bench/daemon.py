"""A daemon to measure: on a cgroup, a pin folder and a socket of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click
import grpc

from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as pb_grpc
from peercredd.defaults import TCP_PORT
from peercredd.mounts import cgroup_directory

START_SECONDS = 60
STOP_SECONDS = 20
POLL_SECONDS = 0.002

TCP_ADDRESS = f"127.0.0.1:{TCP_PORT}"
"""Free in the benchmark's own network namespace."""

COMMAND = (sys.executable, "-m", "peercredd")


class Daemon(NamedTuple):
    """A running daemon and what is its own."""

    cgroup: Path
    """Captured: the benchmark and the daemon are in it."""
    pin_dir: Path
    socket: Path
    exec_time: float
    """time.perf_counter() at its exec."""

    @property
    def address(self) -> str:
        """For gRPC."""
        return f"unix:{self.socket}"

    def status(self) -> pb.GetStatusResponse:
        """What it says of itself."""
        with grpc.insecure_channel(self.address) as channel:
            return pb_grpc.PeerCredentialsStub(channel).GetStatus(pb.GetStatusRequest())


@contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """A cgroup v2 directory of that name, removed afterwards."""
    path = cgroup_directory("root") / name
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


@contextmanager
def running(*options: str, tcp: bool = False, cache_dir: Path | None = None) -> Iterator[Daemon]:
    """Enter a cgroup, start a daemon in it, wait until its socket answers; undo it all.

    With `tcp` everybody may ask it at TCP_ADDRESS, too. Without a `cache_dir` it compiles.
    """
    with (
        tempfile.TemporaryDirectory(prefix=f"peercredd-bench-{os.getpid()}-") as folder,
        cgroup(Path(folder).name) as captured,
        open(Path(folder) / "log", "w+b") as log,
        # The daemon too: else it would not know its callers on TCP.
        _inside(captured),
    ):
        pin_dir = Path("/sys/fs/bpf") / captured.name
        path = Path(folder) / "run" / "peercredd.sock"
        exec_time = time.perf_counter()
        process = subprocess.Popen(
            [
                *COMMAND,
                *("--config", "/dev/null", "--group", "root"),
                *(() if tcp else ("--no-tcp",)),
                *("--cgroup", str(captured)),
                *("--pin-dir", str(pin_dir), "--socket", str(path)),
                *("--cache-dir", str(cache_dir or Path(folder) / "cache")),
                *("--so-peercred-state", str(Path(folder) / "so_peercred.json")),
                *options,
            ],
            stdout=log,
            stderr=log,
            # Ctrl-C is for the benchmark: to the daemon, a second signal means force.
            process_group=0,
        )
        try:
            _wait_until_listening(process, path)
            yield Daemon(captured, pin_dir, path, exec_time)
        except _StartError as failure:
            log.seek(0)
            raise click.ClickException(f"{failure}:\n{log.read().decode()}") from None
        finally:
            _stop(process)
            shutil.rmtree(pin_dir, ignore_errors=True)


class _StartError(Exception):
    pass


def _wait_until_listening(process: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                if process.poll() is not None:
                    raise _StartError(f"peercredd exited with {process.returncode}") from None
            else:
                return
        time.sleep(POLL_SECONDS)
    raise _StartError(f"peercredd did not listen within {START_SECONDS} s")


@contextmanager
def _inside(captured: Path) -> Iterator[None]:
    (own,) = (
        line.removeprefix("0::/")
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::/")
    )
    (captured / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (cgroup_directory("root") / own / "cgroup.procs").write_text("0")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
