"""What survives: a daemon killed, a loader killed at any step, a second daemon."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import peercred
from harness import programs, steps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.patience import patient
from harness.place import Place
from harness.routes import V4
from harness.stage import Stage
from harness.users import ALICE, BOB, SERVICE
from peercredd import capture, pins
from peercredd.hooks import PROGRAMS
from peercredd.libbpf import detach_link, get_pinned, library, link_cgroup_id

pytestmark = pytest.mark.kernel

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def wait_until_it_retries(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until a process has opened a folder and gone to sleep again and again since."""
    entries = Path(f"/proc/{process.pid}")
    deadline = time.monotonic() + patient(30)
    sleeps: list[str] = []
    while len(sleeps) < 20:
        assert time.monotonic() < deadline, "it does not wait"
        assert process.poll() is None, "it has not waited"
        (count,) = (
            line
            for line in (entries / "status").read_text().splitlines()
            if line.startswith("voluntary_ctxt_switches")
        )
        if str(folder) in open_files(entries) and count not in sleeps:
            sleeps.append(count)


def open_files(process: Path) -> set[str]:
    """What a process has open, as /proc shows it; what it closes meanwhile may be missing."""
    opened = set()
    for link in (process / "fd").iterdir():
        with suppress(FileNotFoundError):
            opened.add(str(link.readlink()))
    return opened


@pytest.fixture
def place(hook_set: str) -> Iterator[Place]:
    with Cgroup() as cgroup:
        place = Place(cgroup, hook_set)
        yield place
        if place.pin_dir.exists():
            pins.remove(place.pin_dir)


def test_capture_goes_on_while_a_killed_daemon_is_down(place: Place) -> None:
    with ExitStack() as resources:
        origin = resources.enter_context(Origin(place.cgroup))
        first = place.daemon()
        stage = Stage(origin, resources.enter_context(first.client()))
        server, before, while_down = (stage.actor(uid) for uid in (SERVICE, ALICE, BOB))
        listener = stage.listen(server, V4)
        stage.connect(before, listener)
        accepted_before = server(steps.accept, listener.fds)
        first.kill()
        stage.connect(while_down, listener)
        accepted_while_down = server(steps.accept, listener.fds)

        second = resources.enter_context(place.daemon())
        stage.client = resources.enter_context(second.client())
        resources.enter_context(stage)
        place.assert_attached_once()
        assert stage.peer(server, accepted_before)[:2] == (before.pid, ALICE)
        assert stage.peer(server, accepted_while_down)[:2] == (while_down.pid, BOB)
        for accepted in (accepted_before, accepted_while_down):
            assert stage.acceptor(server, accepted.tcp) == stage.told(server, SERVICE)
    place.assert_nothing_attached()


def test_a_second_daemon_on_the_same_pins_names_the_first(place: Place) -> None:
    with place.daemon() as first:
        with pytest.raises(RuntimeError, match=f"held by process {first.process.pid}"):
            place.daemon()
        place.assert_attached_once()
        with first.client() as client:
            assert client.status().daemon_pid == first.process.pid


def test_keep_leaves_the_capture_and_unload_ends_it(place: Place) -> None:
    place.daemon("--keep").close(keeps=True)
    place.assert_attached_once()

    place.unload()
    place.assert_nothing_attached()
    assert not place.pin_dir.exists()


def test_a_capture_is_not_taken_apart_while_somebody_attaches_to_a_cgroup(place: Place) -> None:
    with pins.hold(place.pin_dir):
        assert place.load().returncode == 0
    capture_folder = place.pin_dir / pins.CAPTURE
    descriptor = os.open(capture_folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    command = [sys.executable, "-m", "peercredd", "--pin-dir", str(place.pin_dir), "unload"]
    with subprocess.Popen(command) as unloading:
        wait_until_it_retries(unloading, capture_folder)
        place.assert_attached_once(besides=0)
        os.close(descriptor)
    assert unloading.returncode == 0
    place.assert_nothing_attached()


def test_unload_ends_the_capture_of_a_daemon_that_was_killed(place: Place) -> None:
    place.daemon().kill()
    place.assert_attached_once()

    place.unload()
    place.assert_nothing_attached()
    assert not place.pin_dir.exists()


def test_other_settings_replace_a_kept_capture(place: Place) -> None:
    place.daemon("--keep").close(keeps=True)

    with place.daemon("--max-connections", "77") as second, second.client() as client:
        limits = {table.name: table.max_entries for table in client.status().tables}
        assert limits["connections"] == 77
        place.assert_attached_once()


def test_another_share_replaces_a_kept_capture(place: Place) -> None:
    place.daemon("--keep").close(keeps=True)

    with place.daemon("--max-percent-per-user=10") as second, second.client() as client:
        shares = {table.name: table.max_entries_per_user for table in client.status().tables}
        assert shares["connections"] == place.table_size // 10
        place.assert_attached_once()


@pytest.mark.hook_sets("trace")
def test_another_hook_set_replaces_a_kept_capture(place: Place) -> None:
    place.daemon("--keep").close(keeps=True)

    with place.daemon("--hooks", "cgroup") as second, second.client() as client:
        assert client.status().hook_set == "cgroup"
        programs.wait_until_attached(place.table_size, len(PROGRAMS["cgroup"]) + 1)


KILLED_LOADER = textwrap.dedent(
    """
    import functools, os, signal, sys
    from peercredd import capture, hooks, loader, pins

    settings, pin_dir = sys.argv[1], pins.Path(sys.argv[2])
    load = functools.cache(capture.load)
    capture.load = lambda *arguments, cache=None: load(*arguments)

    def counted(function):
        def wrapper(*arguments):
            global calls
            if not calls:
                os.kill(os.getpid(), signal.SIGKILL)
            calls -= 1
            return function(*arguments)
        return wrapper

    for module, name in (
        (loader, "pin"), (hooks, "attach_to_cgroup"), (hooks, "attach_to_function"),
        (loader.trial, "run"), (loader.older, "learn"), (pins, "publish"),
    ):
        setattr(module, name, counted(getattr(module, name)))

    # Loaded once, here: those that are killed inherit it.
    given = loader.json.loads(settings)
    names = ("hooks", "max_connections", "max_pending")
    cgroup, share = loader.Path(given["cgroup"]), given["max_percent_per_user"]
    capture.load(*(given[name] for name in names), cgroup, share)
    survived = -1
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        survived += 1
        parent = os.getpid()
        if not (pid := os.fork()):
            calls = survived
            os._exit(loader.main([settings, str(parent)]))
        assert pins.capture(pin_dir) is None
        status = os.waitpid(pid, 0)[1]
    assert status == 0, status
    print(survived)
    """
)


def test_a_loader_killed_at_any_step_is_cleaned_up_at_the_next_start(place: Place) -> None:
    with pins.hold(place.pin_dir):
        killing = subprocess.run(
            [sys.executable, "-c", KILLED_LOADER, json.dumps(place.settings), str(place.pin_dir)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Each map is pinned, a program that is attached nowhere too, each other is attached and
        # pinned; then there are three more.
        *_, calls = killing.stdout.splitlines()
        assert int(calls) == len(capture.MAPS) + 1 + 2 * len(place.programs) + 3
        assert [entry.name for entry in place.pin_dir.iterdir()] == [pins.CAPTURE]
        place.assert_attached_once(besides=0)


KILLED_WHILE_LOADING = textwrap.dedent(
    """
    import os, signal, sys
    from peercredd import capture, compiled, compiler, loader

    settings, where, name, calls = sys.argv[1:]
    owner = {"path": compiled.Path, **vars()}[where]
    function, left = getattr(owner, name), int(calls)

    def counted(*arguments):
        global left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*arguments)

    setattr(owner, name, counted)
    loader.main([settings, str(os.getppid())])
    """
)


def test_a_loader_killed_before_it_has_pinned_anything_leaves_nothing(
    place: Place, tmp_path: Path
) -> None:
    settings = {"cache_dir": str(tmp_path / "cache")}
    with pins.hold(place.pin_dir):
        for step in (
            ("compiler", "_code", 1),  # BCC has compiled, and made maps of its own
            ("path", "rename", 0),  # what was compiled is written down, and not in its place
            ("compiled", "create_map", 5),
            ("capture", "_verified", 3),
        ):
            given = json.dumps(place.settings | settings)
            command = [sys.executable, "-c", KILLED_WHILE_LOADING, given, *map(str, step)]
            assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
            assert list(place.pin_dir.iterdir()) == []
            place.assert_nothing_attached()

        loaded = place.load(**settings)
        assert (loaded.returncode, loaded.stderr) == (0, "")
        assert json.loads(loaded.stdout)["compiled"] == "before"
        place.assert_attached_once(besides=0)


def test_a_loader_that_fails_leaves_nothing_attached(place: Place) -> None:
    with pins.hold(place.pin_dir):
        failed = place.load(cgroup=str(place.cgroup.path / "gone"))
        assert failed.returncode == 1
        assert len(failed.stderr.splitlines()) == 1, failed.stderr
        assert list(place.pin_dir.iterdir()) == []
    place.assert_nothing_attached()


def test_a_link_that_is_missing_is_noticed_and_all_are_replaced_at_the_next_start(
    place: Place,
) -> None:
    place.daemon("--keep").close(keeps=True)
    (place.links / place.programs[0]).unlink()

    with place.daemon():
        place.assert_attached_once()


@pytest.mark.hook_sets("cgroup")
def test_a_detached_program_is_noticed_and_replaced_at_the_next_start(place: Place) -> None:
    place.daemon("--keep").close(keeps=True)
    link = get_pinned(place.links / "cgroup_sock_ops")
    assert not library().bpf_link_detach(link)
    assert link_cgroup_id(link) == 0
    os.close(link)

    with place.daemon():
        place.assert_attached_once()


@pytest.mark.hook_sets("trace")
def test_nobody_can_detach_a_tracing_program_while_a_daemon_runs(place: Place) -> None:
    with place.daemon() as daemon, daemon.client() as client:
        link = get_pinned(place.links / "tcp_connect")
        assert library().bpf_link_detach(link)
        os.close(link)
        for pinned in place.links.iterdir():
            pinned.unlink()

        place.assert_attached_once()
        assert all(each.attached for each in client.status().attachments)


def test_a_daemon_that_cannot_serve_leaves_the_capture_that_it_found(place: Place) -> None:
    place.daemon("--keep").close(keeps=True)

    with pytest.raises(RuntimeError, match="/dev/null"):
        place.daemon("--socket", "/dev/null")
    place.assert_attached_once()


@pytest.mark.hook_sets("cgroup")
def test_health_and_lookups_say_at_once_that_a_program_is_detached(place: Place) -> None:
    with (
        place.daemon() as daemon,
        grpc.insecure_channel(daemon.address) as channel,
    ):
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(health_pb2.HealthCheckRequest()).status == SERVING
        link = get_pinned(place.links / "cgroup_sock_ops")
        detach_link(link)
        os.close(link)

        assert check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
        with daemon.client() as client:
            attachments = {each.program: each.attached for each in client.status().attachments}
            assert attachments == {
                **dict.fromkeys(place.programs, True),
                "cgroup_sock_ops": False,
            }
            with pytest.raises(peercred.Unavailable, match="capture is not in place"):
                client.lookup_cookie(1 << 62)
