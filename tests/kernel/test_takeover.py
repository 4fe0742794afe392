"""An upgrade: another version goes on with what the one before it has recorded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness import steps
from harness.actors import Actor, Origin
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.meanwhile import Told, turning_over
from harness.place import Place
from harness.routes import V4
from harness.so_peercred import NOBODY, Credentials
from harness.stage import Stage
from harness.steps import Both
from harness.users import ALICE, BOB, CAROL, SERVICE
from peercredd import pins
from peercredd.hooks import PROGRAMS

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]
LAST_OF_A_CONNECT = "    read_namespaces(task, cred, to);\n    return DROP_NONE;\n"
MARK = "N"

OtherVersion = Callable[[str, str, str], Path]


@pytest.fixture
def place(hook_set: str) -> Iterator[Place]:
    with Cgroup() as cgroup:
        place = Place(cgroup, hook_set)
        yield place
        if place.pin_dir.exists():
            pins.remove(place.pin_dir)


@pytest.fixture
def other_version(tmp_path: Path) -> OtherVersion:
    """A tree with this version, in which a file of bpf/ has one text in the place of another."""

    def made(name: str, text: str, other: str) -> Path:
        tree = tmp_path / "tree"
        for part in ("peercredd", "bpf"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, tree / part, ignore=ignored)
        source = tree / "bpf" / name
        before = source.read_text()
        assert before.count(text) == 1
        source.write_text(before.replace(text, other))
        return tree

    return made


@pytest.fixture
def newer(other_version: OtherVersion) -> Path:
    """One whose records are told by the name of the process: it begins with `MARK`."""
    marked = LAST_OF_A_CONNECT.replace("    return", f"    to->comm[0] = '{MARK}';\n    return")
    return other_version("credentials.h", LAST_OF_A_CONNECT, marked)


class Kept:
    """A capture that its daemon has left running, and a connection that it knew."""

    def __init__(self, place: Place, resources: ExitStack) -> None:
        self._resources = resources
        origin = resources.enter_context(Origin(place.cgroup))
        first = place.daemon("--keep")
        with first.client() as client:
            self.stage = Stage(origin, client)
            self.service, self.alice = self.stage.actor(SERVICE), self.stage.actor(ALICE)
            self.listener = self.stage.listen(self.service, V4)
            self.accepted = self.connected(self.alice)
            self.told = self.stage.answer(self.service, self.accepted.tcp)
        first.close(keeps=True)

    def connected(self, client: Actor) -> Both[int]:
        """The server's end of a new connection."""
        self.stage.connect(client, self.listener)
        return self.service(steps.accept, self.listener.fds)

    def names(self, accepted: Both[int], client: Actor, uid: int) -> bool:
        """Whether both transports say that this is who connected."""
        return self.stage.peer(self.service, accepted)[:2] == (client.pid, uid)

    def go_on_with(self, daemon: Daemon) -> str:
        """Ask this one from now on, until the end of the test; returns its log."""
        self._resources.enter_context(daemon)
        self.stage.client = self._resources.enter_context(daemon.client())
        self._resources.enter_context(self.stage)
        return daemon.log()


@pytest.fixture
def kept(place: Place) -> Iterator[Kept]:
    with ExitStack() as resources:
        yield Kept(place, resources)
    place.assert_nothing_attached()


def is_newer(kept: Kept, accepted: Both[int]) -> bool:
    return (kept.stage.answer(kept.service, accepted.tcp).comm or "").startswith(MARK)


def test_a_new_version_goes_on_with_every_record_and_records_by_itself(
    place: Place, kept: Kept, newer: Path
) -> None:
    stage, service = kept.stage, kept.service
    bob, carol = stage.actor(BOB), stage.actor(CAROL)
    queued = stage.connect(bob, kept.listener)

    log = kept.go_on_with(place.daemon(tree=newer))
    assert '"capture": "taken over"' in log
    place.assert_attached_once()
    assert kept.names(kept.accepted, kept.alice, ALICE)
    assert stage.answer(service, kept.accepted.tcp) == kept.told
    assert not is_newer(kept, kept.accepted)
    assert stage.peer(bob, queued)[:2] == (service.pid, SERVICE)
    assert kept.names(service(steps.accept, kept.listener.fds), bob, BOB)
    after = kept.connected(carol)
    assert kept.names(after, carol, CAROL)
    assert is_newer(kept, after)


def test_while_a_new_version_takes_over_connections_are_told_as_before(
    place: Place, kept: Kept, newer: Path
) -> None:
    server, client = kept.stage.actor(SERVICE), kept.stage.actor(BOB)
    with turning_over(server, client, pause_seconds=0) as told:
        kept.go_on_with(place.daemon(tree=newer))
    assert_told(told, client, BOB, changes=1, hook_set=place.hook_set)


def assert_told(told: Told, client: Actor, uid: int, changes: int, hook_set: str) -> None:
    """Each connection was this client's, whenever the programs changed."""
    assert told.pop(Credentials(client.pid, uid, uid))
    missed = told.pop(NOBODY, 0)
    assert not told
    # What a tracing program does at the instant of a change may be left undone.
    assert missed <= (changes if hook_set == "trace" else 0)


def test_other_limits_of_users_are_taken_over_with_the_records(place: Place, kept: Kept) -> None:
    kept.go_on_with(place.daemon("--max-percent-per-user=10"))
    shares = {table.name: table.max_entries_per_user for table in kept.stage.client.status().tables}
    assert shares["connections"] == place.table_size // 10
    assert kept.names(kept.accepted, kept.alice, ALICE)
    place.assert_attached_once()


def test_auto_goes_on_with_the_hook_set_that_runs_and_says_why(place: Place, kept: Kept) -> None:
    def reason(asked: str) -> str:
        daemon = place.daemon("--hooks", asked, "--keep")
        with daemon.client() as client:
            status = client.status()
            assert client.lookup_cookie(kept.told.server_socket_cookie) == kept.told
        daemon.close(keeps=True)
        assert status.hook_set == place.hook_set
        (unused,) = status.unused_hook_sets
        return unused.reason

    asked_for = f"{place.hook_set} was asked for (--hooks {place.hook_set})"
    assert reason(place.hook_set) == asked_for
    found = reason("auto")
    assert f"the capture that was found running has {place.hook_set}" in found
    assert "peercredd unload" in found
    assert reason("auto") == found
    assert reason(place.hook_set) == asked_for
    kept.go_on_with(place.daemon())


def test_a_version_with_another_layout_says_so_and_what_was_there_is_older(
    place: Place, kept: Kept, other_version: OtherVersion
) -> None:
    tree = other_version("maps.h", "#define EVENT_PAGES 512\n", "#define EVENT_PAGES 256\n")

    log = kept.go_on_with(place.daemon(tree=tree))
    assert "could not be taken over" in log
    assert "its tables are of another size or layout" in log
    place.assert_attached_once()
    assert kept.stage.refusal(kept.service, kept.accepted.tcp) == "OLDER_THAN_CAPTURE"
    after = kept.connected(kept.alice)
    assert kept.stage.answer(kept.service, after.tcp).uid == ALICE


def test_a_version_that_the_kernel_refuses_leaves_the_capture_as_it_was(
    place: Place, kept: Kept, other_version: OtherVersion
) -> None:
    # Nothing tells the verifier where this ends.
    refused = LAST_OF_A_CONNECT.replace("    return", "    to->groups[to->tgid] = 0;\n    return")
    tree = other_version("credentials.h", LAST_OF_A_CONNECT, refused)

    with pytest.raises(RuntimeError, match="the kernel refuses"):
        place.daemon(tree=tree)
    between = kept.connected(kept.alice)
    log = kept.go_on_with(place.daemon())
    assert '"capture": "found running"' in log
    place.assert_attached_once()
    for accepted in (kept.accepted, between):
        assert kept.names(accepted, kept.alice, ALICE)


KILLED_LOADER = textwrap.dedent(
    """
    import functools, json, os, signal, sys
    from pathlib import Path
    from peercredd import about, capture, hooks, loader, takeover

    given = json.loads(sys.argv[1])
    maps = Path(given["pin_dir"]) / "capture" / "maps"
    if given["hooks"] == "cgroup":
        # Loaded once, here: those that are killed inherit it. Tracing programs cannot be: that of
        # one who was killed is attached for some moments more, and none is twice.
        takeover._unused_generation = lambda maps: 1
        load = functools.cache(capture.load)
        capture.load = lambda *arguments, cache=None: load(*arguments)
        names = ("hooks", "max_connections", "max_pending")
        cgroup, share = Path(given["cgroup"]), given["max_percent_per_user"]
        capture.load(*(given[name] for name in names), cgroup, share, capture.Running(maps, 1))
    calls = -1

    def counted(function):
        def wrapper(*arguments):
            global calls
            if not calls:
                os.kill(os.getpid(), signal.SIGKILL)
            calls -= 1
            if function.__name__ == "update":  # of the generation: the new programs act
                print("changed", flush=True)
            return function(*arguments)
        return wrapper

    for module, name in (
        (takeover, "pin"), (hooks, "attach_to_cgroup"), (hooks, "attach_to_function"),
        (takeover, "replace_program"), (takeover.trial, "run"), (about, "write"),
        (takeover.Map, "update"), (Path, "rename"),
    ):
        setattr(module, name, counted(getattr(module, name)))

    survived, status = 0, signal.SIGKILL
    while status == signal.SIGKILL:
        parent = os.getpid()
        if not (pid := os.fork()):
            calls = survived
            os._exit(loader.main([sys.argv[1], str(parent)]))
        status = os.waitpid(pid, 0)[1]
        survived += 1
        print(status, flush=True)
        input()
    """
)


def test_a_loader_killed_at_any_step_of_a_takeover_loses_nothing(place: Place, kept: Kept) -> None:
    share = 10
    command = [sys.executable, "-c", KILLED_LOADER]
    command += [json.dumps(place.settings | {"max_percent_per_user": share})]
    accepted, statuses, changes = [kept.accepted], [], 0
    server, client = kept.stage.actor(SERVICE), kept.stage.actor(BOB)
    with (
        pins.hold(place.pin_dir),
        turning_over(server, client) as told,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as killing,
    ):
        assert killing.stdin
        assert killing.stdout
        for line in killing.stdout:
            changes += line == "changed\n"
            if line.strip().isdecimal():  # else what the last one says
                accepted.append(kept.connected(kept.alice))
                statuses.append(int(line))
                print(file=killing.stdin, flush=True)
    assert killing.returncode == 0
    assert statuses.pop() == 0
    assert len(statuses) > len(PROGRAMS[place.hook_set])
    assert changes > 1
    assert_told(told, client, BOB, changes=changes, hook_set=place.hook_set)

    log = kept.go_on_with(place.daemon(f"--max-percent-per-user={share}"))
    assert '"capture": "found running"' in log
    place.assert_attached_once()
    for each in accepted:
        assert kept.names(each, kept.alice, ALICE)
