"""Which hook set captures, why not the other, and what is told of its programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

import peercred
from harness.cgroup import Cgroup
from harness.daemon import CACHE, Daemon
from harness.requirements import why_no_hook_set
from harness.routes import V4
from harness.stage import Stage
from harness.users import ALICE, SERVICE
from peercredd import hooks, pins, preemption, store
from peercredd.btf import FunctionMissing, KernelTypes, Prototype
from peercredd.libbpf import KernelError
from peercredd.store import Store

pytestmark = pytest.mark.kernel

STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
FUNCTIONS = [program.name for program in hooks.PROGRAMS["trace"]]

LOADER = """
import sys
from peercredd import btf, capture, hooks, loader, preemption

preemption.why_not_to_trace = lambda: None
{patch}
sys.exit(loader.main(sys.argv[1:]))
"""

OTHER_SOURCE = """
source = capture.source_text
capture.source_text = lambda *arguments: source(*arguments).replace({old!r}, {new!r})
"""

OTHER_PROTOTYPE = """
def prototype(self, function, found=btf.KernelTypes.prototype):
    if function != "tcp_connect":
        return found(self, function)
    {instead}

btf.KernelTypes.prototype = prototype
"""

NOT_ON_THE_WAY = "tcp_fastopen_active_disable"
"""A function of a struct sock *sk, that a plain connection never comes by."""

ELSEWHERE = OTHER_SOURCE.format(old="tcp_v4_connect", new=NOT_ON_THE_WAY) + textwrap.dedent(
    f"""
    hooks._TRACE = hooks.PROGRAMS["trace"] = tuple(
        each._replace(name="{NOT_ON_THE_WAY}") if each.name == "tcp_v4_connect" else each
        for each in hooks._TRACE
    )
    """
)

UNUSABLE = {
    "missing": (
        OTHER_PROTOTYPE.format(instead='return found(self, "no_such_function")'),
        "this kernel has no function no_such_function",
    ),
    "other parameters": (
        OTHER_PROTOTYPE.format(instead='return btf.Prototype((("int", "sk"),), "int")'),
        r"this kernel's tcp_connect\(int sk\) has no parameter 'struct sock \*sk'",
    ),
    "inlined": (ELSEWHERE, f"a connection did not pass through {NOT_ON_THE_WAY}"),
    "refused by the verifier": (
        OTHER_SOURCE.format(old="if (!socket)\n        return 0;", new=""),
        "the kernel refuses tcp_",
    ),
}
"""Kernels on which `trace` does not work, and what is said of each."""

PREEMPTING = ("preemption.why_not_to_trace = lambda: 'it misses calls'", "it misses calls")


def run_loader(patch: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LOADER.format(patch=patch), *arguments],
        check=False,
        capture_output=True,
        text=True,
    )


class Pins:
    """A pin directory of a test's own, held by the test."""

    def __init__(self, cgroup: Cgroup) -> None:
        self.path = Path(f"/sys/fs/bpf/peercredd-test-{uuid4().hex[:12]}")
        self._cgroup = cgroup

    def load(self, patch: str, hook_sets: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "pin_dir": str(self.path),
            "cache_dir": os.environ[CACHE],
            "cgroup": str(self._cgroup.path),
            "hooks": hook_sets,
            "max_connections": 1024,
            "max_pending": 1024,
            "max_percent_per_user": 100,
        }
        return run_loader(patch, json.dumps(settings), str(os.getpid()))


@pytest.fixture
def own_pins(cgroup: Cgroup) -> Iterator[Pins]:
    own = Pins(cgroup)
    with pins.hold(own.path):
        yield own
        pins.remove(own.path)


def test_auto_takes_trace_where_the_kernel_does_and_says_why_not_the_other(cgroup: Cgroup) -> None:
    with Daemon(cgroup, "auto") as daemon, daemon.client() as client:
        status = client.status()
    ((unused, reason),) = ((each.hook_set, each.reason) for each in status.unused_hook_sets)
    if objection := preemption.why_not_to_trace() or why_no_hook_set("trace"):
        assert (status.hook_set, unused) == ("cgroup", "trace")
        assert reason.split(" (")[0] in objection
    else:
        assert (status.hook_set, unused) == ("trace", "cgroup")
        assert reason == "trace is preferred (--hooks auto)"


def test_the_hook_set_that_was_asked_for_is_said_to_be(
    hook_set: str, client: peercred.Client
) -> None:
    status = client.status()
    (other,) = {*hooks.HOOK_SETS} - {hook_set}
    assert status.hook_set == hook_set
    assert [(each.hook_set, each.reason) for each in status.unused_hook_sets] == [
        (other, f"{hook_set} was asked for (--hooks {hook_set})")
    ]


@pytest.mark.hook_sets("trace")
@pytest.mark.parametrize("why", [*UNUSABLE, "preempting"])
def test_auto_goes_on_with_cgroup_where_trace_does_not_work_well_and_says_so(
    hook_set: str, own_pins: Pins, why: str
) -> None:
    patch, reason = {**UNUSABLE, "preempting": PREEMPTING}[why]
    done = own_pins.load(patch, "auto")
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)["about"]
    assert about["hook_set"] == "cgroup"
    assert about["unused_hook_sets"].keys() == {"trace"}
    assert re.match(reason, about["unused_hook_sets"]["trace"])
    links = own_pins.path / pins.CAPTURE / pins.LINKS
    assert {link.name for link in links.iterdir()} == {
        program.name for program in hooks.PROGRAMS["cgroup"]
    }
    assert [entry.name for entry in own_pins.path.iterdir()] == [pins.CAPTURE]


@pytest.mark.hook_sets("trace")
@pytest.mark.parametrize("why", UNUSABLE)
def test_where_trace_was_asked_for_and_does_not_work_one_line_says_why_and_nothing_is_left(
    hook_set: str, own_pins: Pins, why: str
) -> None:
    patch, reason = UNUSABLE[why]
    done = own_pins.load(patch, hook_set)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.match(reason, line)
    assert list(own_pins.path.iterdir()) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_that_this_kernel_lacks_is_named(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(self: KernelTypes, name: str, find: Any = KernelTypes.prototype) -> Prototype:
        found: Prototype = find(self, f"{name}_that_no_kernel_has" if name == function else name)
        return found

    monkeypatch.setattr(KernelTypes, "prototype", without)
    with pytest.raises(FunctionMissing, match=f"no function {function}"):
        hooks.context_macros(KernelTypes())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_with_another_prototype_is_named(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(self: KernelTypes, name: str, find: Any = KernelTypes.prototype) -> Prototype:
        found: Prototype = find(self, name)
        return Prototype((("long", "other"),), "long") if name == function else found

    monkeypatch.setattr(KernelTypes, "prototype", changed)
    with pytest.raises(KernelError, match=f"this kernel's {function}\\b"):
        hooks.context_macros(KernelTypes())


BROKEN = {
    "by the compiler": (
        OTHER_SOURCE.format(old="#include", new="no such thing;\n#include"),
        "error: ",
    ),
    "by the verifier": (
        OTHER_SOURCE.format(old="if (!socket)\n        return ", new="if (0)\n        return "),
        "the kernel refuses ",
    ),
}


@pytest.mark.parametrize("by_whom", BROKEN)
def test_what_is_refused_is_one_line_and_the_whole_log_on_demand(
    hook_set: str, by_whom: str
) -> None:
    patch, expected = BROKEN[by_whom]
    brief = run_loader(patch, "--dry-run", hook_set)
    whole = run_loader(patch, "--dry-run", hook_set, "--log")
    assert brief.returncode == whole.returncode == 1
    (line,) = brief.stderr.splitlines()
    assert expected in line
    *log, last = whole.stderr.splitlines()
    assert last == line
    assert len(log) > 3
    *_, complaint = line.split(": ", 1)
    assert complaint in log


def test_each_program_is_listed_by_the_name_of_its_place_and_attached(
    hook_set: str, client: peercred.Client
) -> None:
    attachments = client.status().attachments
    assert {each.program for each in attachments} == {
        program.name for program in hooks.PROGRAMS[hook_set]
    }
    assert all(each.attached for each in attachments)


@pytest.mark.hook_sets("trace")
def test_while_ftrace_is_off_no_program_counts_as_attached(
    hook_set: str, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sysctl itself would silence every daemon of the host.
    ftrace = tmp_path / "ftrace_enabled"
    ftrace.write_text("1\n")
    monkeypatch.setattr(store, "_FTRACE", ftrace)
    with closing(Store(daemon.pin_dir)) as opened:
        assert opened.is_attached()
        ftrace.write_text("0\n")
        assert not opened.is_attached()
        assert not any(each.attached for each in opened.attachments().values())


def test_what_the_kernel_skipped_is_counted_where_it_skips(
    hook_set: str, client: peercred.Client
) -> None:
    missed = {each.missed_count is None for each in client.status().attachments}
    assert missed == {hook_set == "cgroup"}


@pytest.fixture
def statistics() -> Iterator[Path]:
    """The switch that makes the kernel count runs; it is off now."""
    before = STATISTICS.read_text()
    STATISTICS.write_text("0")
    yield STATISTICS
    STATISTICS.write_text(before)


@pytest.mark.hook_sets("trace")
def test_runs_are_counted_while_the_kernel_counts_them(stage: Stage, statistics: Path) -> None:
    def run_counts() -> dict[str, int | None]:
        return {each.program: each.run_count for each in stage.client.status().attachments}

    assert set(run_counts().values()) == {None}
    statistics.write_text("1")
    before = run_counts()
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    stage.connect(client, stage.listen(server, V4))
    after = run_counts()
    for program in ("inet_csk_listen_start", "tcp_v4_connect", "tcp_connect"):
        counted, counted_before = after[program], before[program]
        assert counted is not None
        assert counted_before is not None
        assert counted > counted_before
