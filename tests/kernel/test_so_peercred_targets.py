"""Where SO_PEERCRED on TCP works: the cgroups that are named, as they come and go, and no other."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness import getsockopt
from harness.cgroup import Cgroup
from harness.getsockopt import Answers, ask_in, attached
from harness.opted_in import Place
from peercredd import hooks, pins, so_peercred
from peercredd.libbpf import detach_link, get_pinned
from peercredd.so_peercred import OptIn

# What is attached, and where, has nothing to do with the hook set; and a virtual machine is slow.
pytestmark = [pytest.mark.kernel, pytest.mark.hook_sets("cgroup")]

KNOWN = Answers(knows_its_peers=True, priority_is_refused=False)
UNKNOWN = Answers(knows_its_peers=False, priority_is_refused=False)


@pytest.fixture
def covered() -> Iterator[Cgroup]:
    with Cgroup() as cgroup:
        yield cgroup


@pytest.fixture
def place(covered: Cgroup, hook_set: str, tmp_path: Path) -> Iterator[Place]:
    place = Place(covered, hook_set, tmp_path)
    yield place
    if place.pin_dir.exists():
        pins.remove(place.pin_dir)


@pytest.fixture
def named(covered: Cgroup) -> Iterator[Cgroup]:
    with Cgroup(covered) as cgroup:
        yield cgroup


@pytest.fixture
def other(covered: Cgroup) -> Iterator[Cgroup]:
    with Cgroup(covered) as cgroup:
        yield cgroup


def test_a_configured_cgroup_and_those_below_it_are_answered_and_no_other(
    place: Place, named: Cgroup, other: Cgroup
) -> None:
    with place.daemon("--so-peercred", str(named.path)), Cgroup(named) as below:
        assert ask_in(named) == ask_in(below) == KNOWN
        assert ask_in(other) == ask_in(place.cgroup) == UNKNOWN
        assert attached(other) == attached(below) == attached(place.cgroup) == 0

    assert ask_in(named) == UNKNOWN
    assert attached(named) == 0


def test_all_is_the_whole_capture(place: Place, other: Cgroup) -> None:
    with place.daemon("--so-peercred", "all"):
        assert ask_in(place.cgroup) == ask_in(other) == KNOWN
        assert attached(place.cgroup) == 1


def test_a_cgroup_can_be_enabled_and_disabled_while_the_daemon_runs(
    place: Place, named: Cgroup, other: Cgroup
) -> None:
    with place.daemon("--so-peercred", str(other.path)) as daemon, daemon.client() as client:
        done = place.command("enable", named.path)
        assert (done.returncode, done.stderr) == (0, "")
        assert ask_in(named) == KNOWN

        place.wait_until(daemon, named.path, attached=True)
        assert [
            (each.target, each.source, each.cgroup, each.attached, each.waiting, each.detail)
            for each in client.status().so_peercred
        ] == [
            (str(other.path), "config", str(other.path), True, False, ""),
            (str(named.path), "enabled", str(named.path), True, False, ""),
        ]
        # The command knows the daemon's file, not its flags: this one it sees by its pin.
        assert place.listed() == {
            str(named.path): ("enabled", True),
            str(other.path): ("config", True),
        }

        assert place.command("disable", named.path).returncode == 0
        assert ask_in(named) == UNKNOWN
        assert ask_in(other) == KNOWN
        assert place.listed() == {str(other.path): ("config", True)}


@pytest.mark.parametrize("options", [(), ("--keep",)])
def test_what_is_enabled_survives_the_daemon(
    place: Place, named: Cgroup, options: tuple[str, ...]
) -> None:
    with place.daemon(*options):
        assert place.command("enable", named.path).returncode == 0
    assert ask_in(named) == (KNOWN if options else UNKNOWN)
    assert place.listed() == {str(named.path): ("enabled", bool(options))}

    with place.daemon(*options):
        assert ask_in(named) == KNOWN
        assert attached(named) == 1
    if options:
        place.command("disable", named.path)
    assert ask_in(named) == UNKNOWN or not options


def test_a_kept_link_is_taken_over_and_one_that_is_not_configured_any_more_goes(
    place: Place, named: Cgroup, other: Cgroup
) -> None:
    with place.daemon("--keep", "--so-peercred", str(named.path), "--so-peercred", str(other.path)):
        before = link_of(place, named)

    with place.daemon("--keep", "--so-peercred", str(named.path)):
        assert link_of(place, named) == before
        assert ask_in(named) == KNOWN
        assert ask_in(other) == UNKNOWN
        assert attached(other) == 0


def link_of(place: Place, cgroup: Cgroup) -> int:
    """What identifies a link: the inode of its pin, which bpffs makes anew with each pin."""
    folder = place.pin_dir / pins.CAPTURE / pins.SO_PEERCRED
    return (folder / f"config-{cgroup.path.stat().st_ino}").stat().st_ino


def test_a_killed_daemon_leaves_it_answered_and_the_next_one_takes_it_over(
    place: Place, named: Cgroup
) -> None:
    with place.daemon("--so-peercred", str(named.path)) as daemon:
        daemon.kill()
        assert ask_in(named) == KNOWN

    with place.daemon("--so-peercred", str(named.path)):
        assert attached(named) == 1
    assert attached(named) == 0


def test_a_cgroup_that_is_not_there_yet_is_waited_for_and_made_again_attached_again(
    place: Place,
) -> None:
    above = place.cgroup.path / "above"
    path = above / "named"
    with place.daemon("--so-peercred", str(path)) as daemon, daemon.client() as client:
        (waiting,) = client.status().so_peercred
        assert (waiting.attached, waiting.waiting) == (False, True)
        assert waiting.detail == "there is no such cgroup"
        for _ in range(3):
            above.mkdir()
            path.mkdir()
            place.wait_until(daemon, path, attached=True)
            assert ask_in(existing(path)) == KNOWN
            path.rmdir()
            place.wait_until(daemon, path, attached=False)

            # And where what is above it stays.
            path.mkdir()
            place.wait_until(daemon, path, attached=True)
            assert ask_in(existing(path)) == KNOWN
            path.rmdir()
            above.rmdir()
            place.wait_until(daemon, path, attached=False)


def test_a_cgroup_enabled_at_run_time_that_is_made_again_is_attached_again(place: Place) -> None:
    path = place.cgroup.path / "named"
    with place.daemon() as daemon:
        path.mkdir()
        assert place.command("enable", path).returncode == 0
        path.rmdir()
        place.wait_until(daemon, path, attached=False)
        path.mkdir()
        place.wait_until(daemon, path, attached=True)
        assert ask_in(existing(path)) == KNOWN
    path.rmdir()


def existing(path: Path) -> Cgroup:
    """A folder that the test has made, and removes, itself."""
    cgroup = Cgroup.__new__(Cgroup)
    cgroup.path = path
    return cgroup


def test_commands_at_the_same_time_do_not_undo_each_other(place: Place) -> None:
    with ExitStack() as resources:
        resources.enter_context(place.daemon())
        cgroups = [resources.enter_context(Cgroup(place.cgroup)) for _ in range(6)]
        paths = [cgroup.path for cgroup in cgroups]
        with ThreadPoolExecutor() as threads:
            for action, expected in (("enable", 1), ("disable", 0)):
                results = threads.map(place.command, [action] * len(paths), paths)
                assert {(done.returncode, done.stderr) for done in results} == {(0, "")}
                assert [attached(cgroup) for cgroup in cgroups] == [expected] * len(cgroups)
                assert len(place.listed()) == expected * len(cgroups)


def test_two_targets_that_mean_one_cgroup_have_one_link_that_stays_until_both_are_gone(
    place: Place, named: Cgroup
) -> None:
    twice = f"{named.path}/../{named.path.name}"
    with place.daemon("--so-peercred", str(named.path)):
        for target in (twice, f"{named.path}/"):
            assert place.command("enable", target).returncode == 0
        assert place.command("enable", "--transient", named.path).returncode == 0
        assert attached(named) == 1

        for arguments in ((twice,), (f"{named.path}/",), ("--transient", named.path)):
            assert place.command("disable", *arguments).returncode == 0
            assert ask_in(named) == KNOWN
        assert attached(named) == 1
    assert attached(named) == 0


def test_transient_ends_with_its_cgroup_and_is_not_remembered(place: Place) -> None:
    with place.daemon():
        with Cgroup(place.cgroup) as short:
            assert place.command("enable", "--transient", short.path).returncode == 0
            assert ask_in(short) == KNOWN
            assert place.listed() == {str(short.path): ("transient", True)}
            assert not place.state.exists()
        assert place.listed() == {}


def test_a_link_that_somebody_detached_is_noticed_and_attached_at_the_next_start(
    place: Place, named: Cgroup
) -> None:
    with place.daemon("--keep", "--so-peercred", str(named.path)) as daemon:
        pinned = place.pin_dir / pins.CAPTURE / pins.SO_PEERCRED
        (link,) = pinned.iterdir()
        descriptor = get_pinned(link)
        detach_link(descriptor)
        os.close(descriptor)
        with daemon.client() as client:
            (row,) = client.status().so_peercred
            assert not row.attached

    with place.daemon("--so-peercred", str(named.path)):
        assert ask_in(named) == KNOWN


# Bad input: one line, exit status 1, and nothing changed.


def test_what_cannot_be_enabled_is_refused_in_one_line_and_nothing_is_changed(
    place: Place, named: Cgroup, tmp_path: Path
) -> None:
    gone = place.cgroup.path / "gone"
    with place.daemon(), Cgroup() as outside:
        assert place.refusal("enable", gone) == (
            f"{gone}: there is no such cgroup; make it, or name it in the configuration to wait "
            "for it"
        )
        for path in (tmp_path, outside.path):
            assert place.refusal("enable", path).startswith(
                f"{path} is outside of the captured cgroup {place.cgroup.path}; name one in it"
            )
        procs = named.path / "cgroup.procs"
        assert place.refusal("enable", procs) == (
            f"{procs} is no cgroup v2 directory; name one in {place.cgroup.path}"
        )
        assert place.refusal("disable", named.path) == (
            f"{named.path}: not enabled; `peercredd so-peercred list` shows what is"
        )
        assert place.refusal("disable", "--transient", named.path).startswith(
            f"{named.path}: not enabled until the cgroup goes; "
        )
        assert not place.state.exists()
        assert place.listed() == {}

        place.command("enable", named.path)
        assert place.refusal("enable", named.path) == (
            f"{named.path}: enabled already; nothing to do"
        )
        assert place.listed() == {str(named.path): ("enabled", True)}


def test_without_a_capture_nothing_is_enabled_but_what_was_can_be_disabled(
    place: Place, named: Cgroup
) -> None:
    with place.daemon():
        place.command("enable", named.path)
    for options in ((), ("--transient",)):
        assert place.refusal("enable", *options, place.cgroup.path) == (
            f"no capture runs in {place.pin_dir}; start the daemon, or name its --pin-dir"
        )
    assert place.listed() == {str(named.path): ("enabled", False)}

    assert place.command("disable", named.path).returncode == 0
    assert place.listed() == {}


def test_what_the_configuration_names_is_not_enabled_or_disabled_by_a_command(
    place: Place, named: Cgroup
) -> None:
    place.configure(named.path)
    with place.daemon("--so-peercred", str(named.path)):
        assert place.refusal("enable", named.path).startswith(
            f"{named.path}: enabled by the configuration already"
        )
        assert place.refusal("disable", named.path).startswith(
            f"{named.path}: enabled by the configuration; take it out"
        )
        assert ask_in(named) == KNOWN


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("{named}/cgroup.procs", "so_peercred.cgroups: {named}/cgroup.procs is no cgroup v2"),
        ("/tmp", "so_peercred.cgroups: /tmp is outside of the captured cgroup"),
    ],
)
def test_a_daemon_does_not_start_with_a_target_that_can_never_be(
    place: Place, named: Cgroup, target: str, said: str
) -> None:
    with (
        pytest.raises(RuntimeError, match=said.format(named=named.path)),
        place.daemon("--so-peercred", target.format(named=named.path)),
    ):
        pass
    assert not place.pin_dir.exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.write_text("nonsense"),
        lambda state: state.write_text("[" * 100_000),
        os.mkfifo,
    ],
    ids=["nonsense", "without end", "fifo"],
)
def test_a_broken_list_of_what_is_enabled_is_refused_with_what_mends_it(
    place: Place, named: Cgroup, spoil: Callable[[Path], object]
) -> None:
    place.state.parent.mkdir()
    spoil(place.state)

    with (
        pytest.raises(RuntimeError, match=rf"{place.state} is not .*; remove it"),
        place.daemon("--so-peercred", str(named.path)),
    ):
        pass


def test_nobody_but_root_can_keep_others_from_changing_what_is_enabled(
    place: Place, named: Cgroup
) -> None:
    with place.daemon():
        assert place.command("enable", named.path).returncode == 0
    for file in place.state.parent.iterdir():
        if file != place.state:  # which nobody locks
            assert file.stat().st_mode & 0o777 == 0o600


def test_a_list_that_breaks_while_the_daemon_runs_changes_nothing_and_can_be_mended(
    place: Place, named: Cgroup
) -> None:
    with place.daemon("--so-peercred", str(named.path)) as daemon, daemon.client() as client:
        place.state.parent.mkdir()
        place.state.write_text("nonsense")
        place.wait_until(daemon, place.state, attached=False)
        assert ask_in(named) == KNOWN
        assert f"{place.state} is not" in place.refusal("enable", place.cgroup.path)
        assert len(client.status().so_peercred) == 2

        place.state.unlink()
        assert place.command("enable", place.cgroup.path).returncode == 0
        place.wait_until(daemon, place.cgroup.path, attached=True)


def test_a_kernel_that_does_not_take_the_program_is_said_to_be_one(
    place: Place, named: Cgroup
) -> None:
    place.keep_a_capture()
    lacking = OptIn(place.pin_dir, place.state, [], place.cgroup.path, "no bpf_sockopt")

    with pytest.raises(so_peercred.OptInError, match=r"does not do .*: no bpf_sockopt; run anot"):
        lacking.enable(str(named.path))
    assert not place.state.exists()

    configured = OptIn(place.pin_dir, place.state, ["all"], place.cgroup.path, "no bpf_sockopt")
    configured.locate()
    assert "does not do SO_PEERCRED on TCP: no bpf_sockopt" in str(configured.misconfigured())


# Others' programs at the same cgroup.


@pytest.mark.parametrize("how", ["by a link", "by BPF_F_ALLOW_MULTI"])
def test_a_program_of_others_stays_and_works_beside_ours(
    place: Place, named: Cgroup, how: str
) -> None:
    both = Answers(knows_its_peers=True, priority_is_refused=True)
    only_others = Answers(knows_its_peers=False, priority_is_refused=True)
    with getsockopt.others_program() as program, place.daemon():
        attach = (
            getsockopt.linked(program, named)
            if how == "by a link"
            else getsockopt.attached_by_flags(program, named, getsockopt.ALLOW_MULTI)
        )
        with attach:
            assert ask_in(named) == only_others
            assert place.command("enable", named.path).returncode == 0
            assert ask_in(named) == both
            assert attached(named) == 2
            assert place.command("disable", named.path).returncode == 0
            assert ask_in(named) == only_others

            place.command("enable", named.path)
        assert ask_in(named) == KNOWN


@pytest.mark.parametrize("where", ["there", "above"])
def test_a_program_of_others_that_allows_none_beside_it_is_named_as_the_reason(
    place: Place, named: Cgroup, where: str
) -> None:
    holder = named if where == "there" else place.cgroup
    with (
        getsockopt.others_program() as program,
        getsockopt.attached_by_flags(program, holder, getsockopt.ALONE),
    ):
        with place.daemon():
            assert place.refusal("enable", named.path).startswith(
                f"{named.path}: another BPF program is attached to getsockopt there, or in a "
                "cgroup above, that allows none beside it; have its owner"
            )
            assert place.listed() == {}
            assert not place.state.exists()
        with place.daemon("--so-peercred", str(named.path)) as daemon, daemon.client() as client:
            (row,) = client.status().so_peercred
            assert not row.attached
            assert "another BPF program" in row.detail
            assert attached(holder) == 1


# Killed at any step.

STEPS = (
    (so_peercred, "pin"),
    (so_peercred, "detach_link"),
    (so_peercred, "link_cgroup_id"),
    (so_peercred, "get_pinned"),
    (so_peercred, "read_state"),
    (so_peercred, "write_state"),
    (json, "dump"),
    (os, "fsync"),
    (fcntl, "flock"),
    (hooks, "attach_to_cgroup"),
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "mkdir"),
)
"""What reads or changes something that lasts, on the way to a new state."""


def killed_before_step(number: int, work: Callable[[], object]) -> bool:
    """Do work in a child that kills itself before it takes its step of that number.

    Returns:
        Whether it came so far.
    """
    pid = os.fork()
    if not pid:
        left = number

        def counted(step: Callable[..., object]) -> Callable[..., object]:
            def wrapper(*arguments: object, **named: object) -> object:
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return step(*arguments, **named)

            return wrapper

        for owner, name in STEPS:
            setattr(owner, name, counted(getattr(owner, name)))
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def rows(opt_in: OptIn) -> dict[str, tuple[str, bool]]:
    opt_in.locate()
    return {row.target: (row.source, row.attached) for row in opt_in.rows()}


def settle(opt_in: OptIn) -> dict[str, tuple[str, bool]]:
    opt_in.locate()
    opt_in.reconcile()
    return rows(opt_in)


def test_killed_at_any_step_of_enable_it_is_enabled_or_not_and_nothing_is_hidden(
    place: Place, named: Cgroup
) -> None:
    place.keep_a_capture()
    target = str(named.path)
    seen = set()
    step = 0
    while killed_before_step(step, lambda: place.opt_in().enable(target)):
        step += 1
        left = rows(place.opt_in())
        assert left in ({}, {target: ("enabled", False)}, {target: ("enabled", True)})
        assert attached(named) == (left.get(target) == ("enabled", True))
        if left == {target: ("enabled", False)}:
            place.opt_in().enable(target)
            assert attached(named) == 1
        settled = settle(place.opt_in())
        assert settled == (dict.fromkeys(left, ("enabled", True)))
        assert attached(named) == len(settled)
        seen.add(bool(settled))
        if settled:
            place.opt_in().disable(target)
        assert attached(named) == 0
    assert step >= 10
    assert seen == {False, True}
    assert rows(place.opt_in()) == {target: ("enabled", True)}


def test_killed_at_any_step_of_disable_it_is_enabled_or_not_and_nothing_is_hidden(
    place: Place, named: Cgroup
) -> None:
    place.keep_a_capture()
    target = str(named.path)
    seen = set()
    place.opt_in().enable(target)
    step = 0
    while killed_before_step(step, lambda: place.opt_in().disable(target)):
        step += 1
        left = rows(place.opt_in())
        enabled = left.get(target, ("", False))[0] == "enabled"
        assert left in ({target: ("enabled", True)}, {target: ("leftover", True)}, {})
        assert attached(named) == len(left)
        settled = settle(place.opt_in())
        assert settled == ({target: ("enabled", True)} if enabled else {})
        assert attached(named) == len(settled)
        seen.add(enabled)
        if not enabled:
            place.opt_in().enable(target)
    assert step >= 10
    assert seen == {False, True}
    assert rows(place.opt_in()) == {}
    assert attached(named) == 0


def test_killed_at_any_step_of_a_daemons_start_the_next_start_makes_it_so(
    place: Place, named: Cgroup, other: Cgroup
) -> None:
    place.keep_a_capture()
    before = place.opt_in(other.path)
    after = place.opt_in(named.path)
    step = 0
    settle(before)
    while killed_before_step(step, lambda: settle(place.opt_in(named.path))):
        step += 1
        left = rows(after)
        for cgroup in (named, other):
            shown = left.get(str(cgroup.path)) == ("config", True)
            assert attached(cgroup) == shown
        assert settle(after) == {str(named.path): ("config", True)}
        assert (attached(named), attached(other)) == (1, 0)
        settle(before)
    assert step >= 10
    assert rows(after) == {str(named.path): ("config", True)}
