"""What the serving process keeps resident."""

from __future__ import annotations

import grpc
import psutil

from bench.callers import callers, stretch
from bench.crowd import Crowd
from bench.daemon import Daemon
from bench.effort import Effort
from bench.table import Row, Section, Target, Unit, Verdict
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as pb_grpc

TARGET_BYTES = 45e6
CALLERS = 4


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    """After the start, and after a load of every kind of call."""
    with grpc.insecure_channel(daemon.address) as channel:
        status = pb_grpc.PeerCredentialsStub(channel).GetStatus(pb.GetStatusRequest())
    server = psutil.Process(status.daemon_pid)
    rows = [_row("After the start", server)]
    sockets = effort.open_sockets[-1]
    with Crowd(daemon.cgroup) as gathered:
        gathered.grow(sockets)
        with callers(CALLERS, daemon.address, gathered.questions) as started:
            for kind in ("lookup", "batch", "stream"):
                stretch(started, kind, effort.seconds_per_method)
            rows.append(_row(f"{sockets:,} open sockets, {CALLERS} callers", server))
    return [Section("Memory of the serving process", ("RSS", "PSS"), tuple(rows))]


def _row(name: str, server: psutil.Process) -> Row:
    memory = server.memory_full_info()
    verdict = Verdict(memory.rss, Unit.BYTES, Target(TARGET_BYTES))
    return Row(name, (memory.rss, memory.pss), Unit.BYTES, verdict)
