"""What survives: a daemon killed, a loader killed at any step, a second daemon."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import peercred
from harness import steps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.routes import V4
from harness.stage import Stage
from harness.users import ALICE, BOB, SERVICE
from peercredd import capture, pins
from peercredd.libbpf import detach_link, get_pinned, library, link_cgroup_id

pytestmark = pytest.mark.kernel

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SETTINGS = {"max_connections": 1024, "max_pending": 1024}


@pytest.fixture
def own_cgroup() -> Iterator[Cgroup]:
    with Cgroup() as cgroup:
        yield cgroup


@pytest.fixture
def pin_dir() -> Iterator[Path]:
    pin_dir = Path(f"/sys/fs/bpf/peercredd-test-{uuid4().hex[:12]}")
    yield pin_dir
    if pin_dir.exists():
        pins.remove(pin_dir)


def attached(cgroup: Cgroup) -> dict[str, int]:
    """How many programs each place of a cgroup has."""
    directory = os.open(cgroup.path, os.O_RDONLY)
    counts = {}
    try:
        for program in capture.CGROUP_PROGRAMS:
            count = ctypes.c_uint32(64)
            identities = (ctypes.c_uint32 * 64)()
            flags = ctypes.c_uint32()
            assert not library().bpf_prog_query(
                directory,
                program.attach_type,
                0,
                ctypes.byref(flags),
                identities,
                ctypes.byref(count),
            )
            counts[program.name] = count.value
    finally:
        os.close(directory)
    return counts


NONE = {program.name: 0 for program in capture.CGROUP_PROGRAMS}
ONE = {program.name: 1 for program in capture.CGROUP_PROGRAMS}


def run_daemon(cgroup: Cgroup, pin_dir: Path, *options: str) -> Daemon:
    return Daemon(cgroup, "cgroup", *options, pin_dir=pin_dir)


def test_capture_goes_on_while_a_killed_daemon_is_down(own_cgroup: Cgroup, pin_dir: Path) -> None:
    with ExitStack() as resources:
        origin = resources.enter_context(Origin(own_cgroup))
        first = run_daemon(own_cgroup, pin_dir)
        stage = Stage(origin, resources.enter_context(peercred.Client(first.address)))
        server, before, while_down = (stage.actor(uid) for uid in (SERVICE, ALICE, BOB))
        listener = stage.listen(server, V4)
        stage.connect(before, listener)
        accepted_before = server(steps.accept, listener.fds)
        first.kill()
        stage.connect(while_down, listener)
        accepted_while_down = server(steps.accept, listener.fds)

        second = resources.enter_context(run_daemon(own_cgroup, pin_dir))
        stage.client = resources.enter_context(peercred.Client(second.address))
        resources.enter_context(stage)
        assert attached(own_cgroup) == ONE
        assert stage.peer(server, accepted_before)[:2] == (before.pid, ALICE)
        assert stage.peer(server, accepted_while_down)[:2] == (while_down.pid, BOB)
    assert attached(own_cgroup) == NONE


def test_a_second_daemon_on_the_same_pins_names_the_first(
    own_cgroup: Cgroup, pin_dir: Path
) -> None:
    with run_daemon(own_cgroup, pin_dir) as first:
        with pytest.raises(RuntimeError, match=f"held by process {first.process.pid}"):
            run_daemon(own_cgroup, pin_dir)
        assert attached(own_cgroup) == ONE
        with peercred.Client(first.address) as client:
            assert client.status().daemon_pid == first.process.pid


def test_keep_leaves_the_capture_and_unload_ends_it(own_cgroup: Cgroup, pin_dir: Path) -> None:
    daemon = run_daemon(own_cgroup, pin_dir, "--keep")
    daemon.close(keeps=True)
    assert attached(own_cgroup) == ONE

    unload = [sys.executable, "-m", "peercredd", "--pin-dir", str(pin_dir), "unload"]
    assert subprocess.run(unload, check=False).returncode == 0
    assert attached(own_cgroup) == NONE
    assert not pin_dir.exists()


def test_other_settings_replace_a_kept_capture(own_cgroup: Cgroup, pin_dir: Path) -> None:
    daemon = run_daemon(own_cgroup, pin_dir, "--keep")
    daemon.close(keeps=True)

    with (
        run_daemon(own_cgroup, pin_dir, "--max-connections", "77") as second,
        peercred.Client(second.address) as client,
    ):
        limits = {table.name: table.max_entries for table in client.status().tables}
        assert limits["connections"] == 77
        assert attached(own_cgroup) == ONE


KILLED_LOADER = textwrap.dedent(
    """
    import os, signal, sys
    from peercredd import loader, pins

    calls = int(sys.argv[1])

    def counted(function):
        def wrapper(*arguments):
            global calls
            if not calls:
                os.kill(os.getpid(), signal.SIGKILL)
            calls -= 1
            return function(*arguments)
        return wrapper

    loader.pin = counted(loader.pin)
    loader.create_link = counted(loader.create_link)
    loader.older.learn = counted(loader.older.learn)
    pins.publish = counted(pins.publish)
    sys.exit(loader.main(sys.argv[2:]))
    """
)


def test_a_loader_killed_at_any_step_is_cleaned_up_at_the_next_start(
    own_cgroup: Cgroup, pin_dir: Path
) -> None:
    settings = {**SETTINGS, "pin_dir": str(pin_dir), "cgroup": str(own_cgroup.path)}
    steps_of_a_load = len(capture.MAPS) + 2 * len(capture.CGROUP_PROGRAMS) + 2
    with pins.hold(pin_dir):
        for calls in range(steps_of_a_load):
            killed = subprocess.run(
                [sys.executable, "-c", KILLED_LOADER, str(calls), json.dumps(settings)],
                check=False,
                capture_output=True,
            )
            assert killed.returncode == -signal.SIGKILL, killed
            assert pins.capture(pin_dir) is None
        whole = subprocess.run(
            [sys.executable, "-m", "peercredd.loader", json.dumps(settings)],
            check=True,
            capture_output=True,
        )
        assert json.loads(whole.stdout)["adopted"] is False
        assert [entry.name for entry in pin_dir.iterdir()] == [pins.CAPTURE]
        assert attached(own_cgroup) == ONE


def test_a_loader_that_fails_leaves_nothing_attached(own_cgroup: Cgroup, pin_dir: Path) -> None:
    settings = {**SETTINGS, "pin_dir": str(pin_dir), "cgroup": str(own_cgroup.path / "gone")}
    with pins.hold(pin_dir):
        failed = subprocess.run(
            [sys.executable, "-m", "peercredd.loader", json.dumps(settings)],
            check=False,
            capture_output=True,
            text=True,
        )
        assert failed.returncode == 1
        assert len(failed.stderr.splitlines()) == 1, failed.stderr
        assert list(pin_dir.iterdir()) == []


def test_a_detached_program_is_noticed_and_replaced_at_the_next_start(
    own_cgroup: Cgroup, pin_dir: Path
) -> None:
    daemon = run_daemon(own_cgroup, pin_dir, "--keep")
    daemon.close(keeps=True)
    link = get_pinned(pin_dir / pins.CAPTURE / pins.LINKS / "cgroup_sock_ops")
    assert not library().bpf_link_detach(link)
    assert link_cgroup_id(link) == 0
    os.close(link)

    with run_daemon(own_cgroup, pin_dir):
        assert attached(own_cgroup) == ONE


def test_a_daemon_that_cannot_serve_leaves_the_capture_that_it_found(
    own_cgroup: Cgroup, pin_dir: Path
) -> None:
    run_daemon(own_cgroup, pin_dir, "--keep").close(keeps=True)

    with pytest.raises(RuntimeError, match="/dev/null"):
        run_daemon(own_cgroup, pin_dir, "--socket", "/dev/null")
    assert attached(own_cgroup) == ONE


def test_health_and_lookups_say_at_once_that_a_program_is_detached(
    own_cgroup: Cgroup, pin_dir: Path
) -> None:
    with (
        run_daemon(own_cgroup, pin_dir) as daemon,
        grpc.insecure_channel(daemon.address) as channel,
    ):
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(health_pb2.HealthCheckRequest()).status == SERVING
        link = get_pinned(pin_dir / pins.CAPTURE / pins.LINKS / "cgroup_sock_ops")
        detach_link(link)
        os.close(link)

        assert check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
        with peercred.Client(daemon.address) as client:
            attachments = {each.program: each.attached for each in client.status().attachments}
            assert attachments == {**dict.fromkeys(ONE, True), "cgroup_sock_ops": False}
            with pytest.raises(peercred.Unavailable, match="capture is not in place"):
                client.lookup_cookie(1 << 62)
