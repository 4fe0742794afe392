"""The wall clock is set while everything runs: nobody waits longer or shorter for it.

It is that of the daemon's processes, and of a command, alone: see harness.wall_clock.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from harness import steps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.patience import CALL_SECONDS, patient
from harness.routes import V4
from harness.stage import Stage
from harness.users import ALICE, SERVICE
from harness.wall_clock import WallClock

pytestmark = pytest.mark.kernel

DAY = 24 * 60 * 60


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[WallClock]:
    with WallClock(tmp_path) as clock:
        yield clock


@pytest.fixture
def captured() -> Iterator[Cgroup]:
    with Cgroup() as cgroup:
        yield cgroup


@pytest.fixture
def daemon(
    captured: Cgroup, hook_set: str, clock: WallClock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Daemon]:
    often = [f"--sweep-{what}-seconds=1" for what in ("interval", "pending-age", "record-age")]
    with monkeypatch.context() as started:
        for name, value in clock.environment.items():
            started.setenv(name, value)
        daemon = Daemon(captured, hook_set, "--log-level=debug", *often)
    with daemon:
        yield daemon


def wait_for_sweeps(daemon: Daemon, count: int) -> None:
    deadline = time.monotonic() + patient(60)
    before = daemon.log().count('"swept"')
    while daemon.log().count('"swept"') < before + count:
        assert time.monotonic() < deadline, daemon.log()
        os.sched_yield()


def next_event(watch: subprocess.Popen[str]) -> str:
    assert watch.stdout
    return str(json.loads(watch.stdout.readline())["event"])


@pytest.mark.parametrize("seconds", [-DAY, DAY])
def test_a_clock_that_is_set_makes_no_answer_wrong_late_or_missing(
    seconds: int, daemon: Daemon, captured: Cgroup, clock: WallClock
) -> None:
    with (
        Origin(captured) as origin,
        daemon.client() as client,
        grpc.insecure_channel(daemon.address) as channel,
        subprocess.Popen(
            [sys.executable, "-m", "peercred.cli.main", "watch", "--json"],
            env=os.environ | clock.environment | {"PEERCRED_ADDRESS": daemon.address},
            stdout=subprocess.PIPE,
            text=True,
        ) as watch,
        Stage(origin, client) as stage,
    ):
        try:
            assert next_event(watch) == "synchronized"
            service, alice = stage.actor(SERVICE), stage.actor(ALICE)
            listener = stage.listen(service, V4)
            stage.connect(alice, listener)
            before = service(steps.accept, listener.fds)
            assert next_event(watch) == "established"
            started = client.status().capture_start_time

            wait_for_sweeps(daemon, 1)
            clock.set_off(seconds)

            told = client.status()
            # It is the daemon's clock that was set, and this is all that tells of it.
            off = told.capture_start_time - started
            assert abs(off - timedelta(seconds=seconds)) < timedelta(seconds=60)
            assert told.problems == ()
            wait_for_sweeps(daemon, 2)
            assert stage.peer(service, before)[:2] == (alice.pid, ALICE)
            ends = stage.connect(alice, listener)
            after = service(steps.accept, listener.fds)
            assert next_event(watch) == "established"
            assert stage.peer(service, after)[:2] == (alice.pid, ALICE)
            alice(steps.close, ends)
            service(steps.close, after)
            assert next_event(watch) == "retired"
            check = health_pb2_grpc.HealthStub(channel).Check
            state = check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS).status
            assert state == health_pb2.HealthCheckResponse.SERVING
            assert client.status().problems == ()
            assert "has ended" not in daemon.log()
        finally:
            watch.send_signal(signal.SIGINT)
