"""What survives: the server or its supervisor killed, pins removed, limits reached."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import peercred
from harness import programs, steps
from harness.actors import Actor, Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.meanwhile import turning_over
from harness.patience import CALL_SECONDS, patient
from harness.routes import V4
from harness.so_peercred import Credentials
from harness.stage import Listener, Stage
from harness.steps import Both
from harness.users import ALICE, BOB, CAROL, SERVICE
from peercredd import pins
from peercredd.hooks import PROGRAMS
from peercredd.libbpf import KernelError, get_pinned

pytestmark = pytest.mark.kernel

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
ROUNDS = int(os.environ.get("PEERCREDD_KILLS", "10"))
"""Of each kind of kill."""


class Place:
    """A daemon on a cgroup of its own, of which the programs can be counted."""

    def __init__(self, cgroup: Cgroup, hook_set: str, pin_dir: Path | None = None) -> None:
        self.cgroup = cgroup
        self.hook_set = hook_set
        self.pin_dir = pin_dir or Path(f"/sys/fs/bpf/peercredd-test-{uuid4().hex[:12]}")
        # What tells this place's programs from those that others attach meanwhile.
        self.table_size = random.randrange(1025, 16384)

    def daemon(self, *options: str) -> Daemon:
        sizes = (f"--max-connections={self.table_size}", f"--max-pending={self.table_size}")
        return Daemon(self.cgroup, self.hook_set, *sizes, *options, pin_dir=self.pin_dir)

    def assert_attached_once(self) -> None:
        programs.wait_until_attached(self.table_size, len(PROGRAMS[self.hook_set]) + 1)


@pytest.fixture
def place(hook_set: str) -> Iterator[Place]:
    with Cgroup() as cgroup:
        place = Place(cgroup, hook_set)
        yield place
        if place.pin_dir.exists():
            pins.remove(place.pin_dir)


@contextmanager
def looked_at(place: Place, daemon: Daemon) -> Iterator[Stage]:
    with (
        Origin(place.cgroup) as origin,
        daemon.client() as client,
        Stage(origin, client) as stage,
    ):
        yield stage


def server_pid(daemon: Daemon, other_than: int = 0) -> int:
    """Wait until a server answers, and another one than that."""
    deadline = time.monotonic() + patient(60)
    while True:
        assert time.monotonic() < deadline, daemon.log()
        assert daemon.process.poll() is None, daemon.log()
        # A new client each time: one that was refused waits before it tries again.
        try:
            with daemon.client() as client:
                pid = client.status().server_pid
        except peercred.Unavailable:
            continue
        if pid != other_than:
            return pid


def wait_until(happens: str, daemon: Daemon) -> None:
    deadline = time.monotonic() + patient(90)
    while happens not in daemon.log():
        assert time.monotonic() < deadline, daemon.log()
        os.sched_yield()


class Load:
    """Asks about one connection again and again, from the outside, while servers die."""

    def __init__(self, daemon: Daemon, cookie: int, expected: tuple[int, int]) -> None:
        self.right = 0
        self.wrong: list[str] = []
        self._daemon = daemon
        self._cookie = cookie
        self._expected = expected
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._ended.is_set():
            with self._daemon.client() as client:
                try:
                    while not self._ended.is_set():
                        found = client.lookup_cookie(self._cookie)
                        if (found.pid, found.uid) == self._expected:
                            self.right += 1
                        else:
                            self.wrong.append(str(found))
                except peercred.Unavailable:
                    continue
                except peercred.PeerCredError as error:
                    self.wrong.append(repr(error))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.timeout(300 + 6 * ROUNDS)
def test_servers_are_killed_under_load_and_nothing_is_missed_wrong_or_attached_twice(
    place: Place,
) -> None:
    with place.daemon() as daemon, ExitStack() as clients, looked_at(place, daemon) as stage:
        service = stage.actor(SERVICE)
        listener = stage.listen(service, V4)
        alice, bob = stage.actor(ALICE), stage.actor(BOB)
        held = connected(stage, alice, service, listener)
        cookie = stage.answer(service, held.tcp).server_socket_cookie
        carol = stage.actor(CAROL)
        with (
            Load(daemon, cookie, (alice.pid, ALICE)) as load,
            turning_over(stage.actor(SERVICE), carol) as told,
        ):
            pid = server_pid(daemon)
            for number in range(ROUNDS):
                client, uid = (alice, ALICE) if number % 2 else (bob, BOB)
                before = connected(stage, client, service, listener)
                os.kill(pid, signal.SIGKILL)
                while_down = connected(stage, client, service, listener)
                pid = server_pid(daemon, other_than=pid)
                after = connected(stage, client, service, listener)
                stage.client = clients.enter_context(daemon.client())
                for accepted in (before, while_down, after):
                    assert stage.peer(service, accepted)[:2] == (client.pid, uid)
                place.assert_attached_once()
        assert load.wrong == []
        assert load.right
        assert set(told) == {Credentials(carol.pid, CAROL, CAROL)}
        log = daemon.log()
        assert log.count("the server has ended and is started again") == ROUNDS
    assert not place.pin_dir.exists()


def connected(stage: Stage, client: Actor, service: Actor, listener: Listener) -> Both[int]:
    stage.connect(client, listener)
    return service(steps.accept, listener.fds)


def kill_both(daemon: Daemon, server: int) -> None:
    # Stopped, the daemon cannot start another server before it is killed itself.
    daemon.process.send_signal(signal.SIGSTOP)
    os.kill(server, signal.SIGKILL)
    daemon.kill()


def kill_the_supervisor(daemon: Daemon, server: int) -> None:
    pidfd = os.pidfd_open(server)
    daemon.kill()
    with os.fdopen(pidfd):
        # Not select(), which takes no descriptor from 1024 on.
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        assert ended.poll(patient(30) * 1000), "the server outlives its supervisor"


@pytest.mark.timeout(300 + 6 * ROUNDS)
@pytest.mark.parametrize("kill", [kill_both, kill_the_supervisor])
def test_what_is_connected_while_all_are_dead_is_answered_by_the_next(
    place: Place, kill: Callable[[Daemon, int], None]
) -> None:
    with ExitStack() as resources:
        origin = resources.enter_context(Origin(place.cgroup))
        daemon = place.daemon()
        stage = Stage(origin, resources.enter_context(daemon.client()))
        service, alice, bob = (stage.actor(uid) for uid in (SERVICE, ALICE, BOB))
        listener = stage.listen(service, V4)
        held = []
        carol = stage.actor(CAROL)
        with turning_over(stage.actor(SERVICE), carol) as told:
            for number in range(ROUNDS):
                client, uid = (alice, ALICE) if number % 2 else (bob, BOB)
                server = server_pid(daemon)
                held.append((connected(stage, client, service, listener), client.pid, uid))
                kill(daemon, server)
                held.append((connected(stage, client, service, listener), client.pid, uid))
                daemon = place.daemon()
                place.assert_attached_once()
                stage.client = resources.enter_context(daemon.client())
                for accepted, pid, asked in held:
                    assert stage.peer(service, accepted)[:2] == (pid, asked)
        assert set(told) == {Credentials(carol.pid, CAROL, CAROL)}
        resources.enter_context(daemon)
        resources.enter_context(stage)


def test_a_server_that_hangs_is_replaced(place: Place) -> None:
    with place.daemon() as daemon:
        pid = server_pid(daemon)
        os.kill(pid, signal.SIGSTOP)
        wait_until("silent for 30 s, so it was killed", daemon)
        assert server_pid(daemon, other_than=pid)


def health(channel: grpc.Channel) -> int:
    check = health_pb2_grpc.HealthStub(channel).Check
    return int(check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS).status)


def wait_for_health(channel: grpc.Channel, state: int, daemon: Daemon) -> None:
    deadline = time.monotonic() + patient(30)
    while health(channel) != state:
        assert time.monotonic() < deadline, daemon.log()
        os.sched_yield()


@contextmanager
def open_files(pid: int, most: int) -> Iterator[None]:
    """Meanwhile a server may have no more files open than so many."""
    # A root that lacks CAP_SYS_RESOURCE may not; the server's own user may.
    command = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "prlimit"]
    command += ["--pid", str(pid)]
    asked = [*command, "--nofile", "--raw", "--noheadings", "--output=SOFT"]
    before = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    subprocess.run([*command, f"--nofile={most}:"], check=True)
    try:
        yield
    finally:
        subprocess.run([*command, f"--nofile={before}:"], check=True)


def test_without_descriptors_health_says_so_until_there_are_some(place: Place) -> None:
    with ExitStack() as resources:
        daemon = resources.enter_context(place.daemon())
        client = resources.enter_context(daemon.client())
        channel = resources.enter_context(grpc.insecure_channel(daemon.address))
        client.status()
        assert health(channel) == SERVING
        with open_files(server_pid(daemon), 3):
            wait_for_health(channel, NOT_SERVING, daemon)

            (problem,) = client.status().problems
            assert "may have no more than 3 files open; raise LimitNOFILE=" in problem
            with pytest.raises(peercred.NotFound):
                client.lookup_cookie(1)
            wait_until(problem, daemon)
        wait_for_health(channel, SERVING, daemon)
        assert client.status().problems == ()
        wait_until("serving again", daemon)
        with daemon.client() as newcomer:
            assert newcomer.status().daemon_pid == daemon.process.pid


def test_pins_that_are_removed_are_put_back(place: Place) -> None:
    with place.daemon() as daemon, ExitStack() as clients, looked_at(place, daemon) as stage:
        service, alice = stage.actor(SERVICE), stage.actor(ALICE)
        listener = stage.listen(service, V4)
        before = connected(stage, alice, service, listener)
        subprocess.run(["rm", "-r", str(place.pin_dir)], check=True)
        wait_until("pins had been removed, and were put back", daemon)

        place.assert_attached_once()
        server = server_pid(daemon)
        os.kill(server, signal.SIGKILL)
        server_pid(daemon, other_than=server)
        stage.client = clients.enter_context(daemon.client())
        assert stage.peer(service, before)[:2] == (alice.pid, ALICE)
        after = connected(stage, alice, service, listener)
        assert stage.peer(service, after)[:2] == (alice.pid, ALICE)
        assert stage.client.status().problems == ()
        with pytest.raises(RuntimeError, match=f"held by process {daemon.process.pid}"):
            place.daemon()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A bpffs of the test's own."""
    path = tmp_path / "bpf"
    path.mkdir()
    mount(path)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True)


def mount(path: Path) -> None:
    subprocess.run(["mount", "-t", "bpf", "bpf", str(path)], check=True)


def test_an_unmounted_bpffs_is_told_and_a_mounted_one_is_used(hook_set: str, mounted: Path) -> None:
    with Cgroup() as cgroup:
        place = Place(cgroup, hook_set, mounted / "peercredd")
        with (
            place.daemon() as daemon,
            daemon.client() as client,
            grpc.insecure_channel(daemon.address) as channel,
        ):
            subprocess.run(["umount", "--lazy", str(mounted)], check=True)
            wait_for_health(channel, NOT_SERVING, daemon)
            (problem,) = client.status().problems
            assert "is not on a BPF file system" in problem
            place.assert_attached_once()

            mount(mounted)
            wait_for_health(channel, SERVING, daemon)
            assert client.status().problems == ()
            link = get_pinned(place.pin_dir / pins.CAPTURE / pins.MAPS / "connections")
            os.close(link)
        with pytest.raises(KernelError):
            get_pinned(place.pin_dir / pins.CAPTURE / pins.MAPS / "connections")


def test_a_removed_cgroup_is_told_and_a_restart_mends_it(place: Place) -> None:
    daemon = place.daemon("--keep")
    with grpc.insecure_channel(daemon.address) as channel, daemon.client() as client:
        assert health(channel) == SERVING
        place.cgroup.close()

        wait_for_health(channel, NOT_SERVING, daemon)
        (problem,) = client.status().problems
        assert f"{place.cgroup.path} was removed: restart peercredd" in problem
        wait_until(problem, daemon)
        with pytest.raises(peercred.Unavailable, match="capture is not in place"):
            client.lookup_tuple(("127.0.0.1", 1), ("127.0.0.1", 2))
    daemon.close(keeps=True)

    place.cgroup.path.mkdir()
    with place.daemon() as daemon, looked_at(place, daemon) as stage:
        assert stage.client.status().problems == ()
        place.assert_attached_once()
        service, alice = stage.actor(SERVICE), stage.actor(ALICE)
        accepted = connected(stage, alice, service, stage.listen(service, V4))
        assert stage.peer(service, accepted)[:2] == (alice.pid, ALICE)


def test_a_server_that_cannot_start_is_tried_again(place: Place) -> None:
    with place.daemon() as daemon:
        pid = server_pid(daemon)
        folder = daemon.socket.parent
        moved = folder.rename(folder.with_name("moved"))
        os.kill(pid, signal.SIGKILL)
        wait_until("No such file or directory", daemon)
        moved.rename(folder)
        assert server_pid(daemon, other_than=pid)
