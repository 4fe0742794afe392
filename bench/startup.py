"""How soon a daemon that is started answers."""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import click
import grpc

from bench.callers import key
from bench.crowd import question
from bench.daemon import running
from bench.effort import Effort
from bench.table import Row, Section, Target, Unit, Verdict
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as pb_grpc

TARGET_SECONDS = 2.0


def measure(effort: Effort) -> list[Section]:
    """From the daemon's exec to the right answer about a connection made then."""
    with tempfile.TemporaryDirectory(prefix="peercredd-bench-") as folder:
        cache = Path(folder) / "cache"
        first = [_start(None) for _ in range(effort.starts)]
        _start(cache)
        later = [_start(cache) for _ in range(effort.starts)]
    median = statistics.median(later)
    verdict = Verdict(median, Unit.SECONDS, Target(TARGET_SECONDS))
    rows = (
        Row("Start to first answer", _spread(later), Unit.SECONDS, verdict),
        Row("The very first, that compiles", _spread(first), Unit.SECONDS),
    )
    return [Section("The daemon's start", ("fastest", "median", "slowest"), rows)]


def _spread(times: list[float]) -> tuple[float, float, float]:
    return min(times), statistics.median(times), max(times)


def _start(cache: Path | None) -> float:
    with (
        running(cache_dir=cache) as daemon,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
        grpc.insecure_channel(daemon.address) as channel,
    ):
        request = pb.LookupRequest(key=key(question(accepted, os.geteuid(), os.getpid())))
        answer = pb_grpc.PeerCredentialsStub(channel).Lookup(request)
        elapsed = time.perf_counter() - daemon.exec_time
        if answer.peer.pid != os.getpid():
            raise click.ClickException("the first answer names another process")
        return elapsed
