"""How soon a daemon that is started answers."""

from __future__ import annotations

import os
import socket
import statistics
import time

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
    times = [_start() for _ in range(effort.starts)]
    median = statistics.median(times)
    verdict = Verdict(median, Unit.SECONDS, Target(TARGET_SECONDS))
    row = Row("Start to first answer", (min(times), median, max(times)), Unit.SECONDS, verdict)
    return [Section("The daemon's start", ("fastest", "median", "slowest"), (row,))]


def _start() -> float:
    with (
        running() as daemon,
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
