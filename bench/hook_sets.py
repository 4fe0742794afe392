"""What a connection costs with each hook set, and with BCC's tools for connect and accept."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench.child import Child
from bench.cycle import Cost, Cycle, compiled
from bench.daemon import cgroup
from bench.effort import Effort
from bench.table import Row, Section, Unit, Verdict
from peercredd.hooks import HOOK_SETS
from peercredd.libbpf import can_trace

TITLE = "One connection, by what is attached"
FAMILIES = {"IPv4": "4", "IPv6": "6"}
NOTHING = "nothing"
TOOLS = {"tcpconnect": ("--print-uid", "--lport"), "tcpaccept": ()}
"""BCC's, with what makes them print who connected, and which connection it was."""
BOTH_TOOLS = " + ".join(TOOLS)


class _Attachable(Child):
    """Programs that come and go while the process that loaded them stays."""

    def wait_until_loaded(self) -> None:
        """They are not attached then."""
        self.hear()

    def attach(self) -> None:
        """All of them."""
        self.tell(True)
        self.hear()

    def detach(self) -> tuple[float, int]:
        """All of them; returns the CPU seconds that the process spent, and the events it read."""
        self.tell(False)
        cpu_seconds, events = self.hear()
        return cpu_seconds, events


class _Turn(NamedTuple):
    """One stretch of connections with one thing attached."""

    cost: Cost
    reader_seconds: float
    """CPU time, for each connection, of the processes that read events."""
    events: tuple[int, ...]
    """That each of them read."""


Rounds = Sequence[Mapping[str, _Turn]]


def measure(effort: Effort) -> list[Section]:
    """Same task, same CPU; in each round one turn with nothing attached, and one with each.

    While `trace` is attached it sees every socket of the host, as the tools do.
    """
    if not can_trace():
        return [Section(TITLE, (), (_left_out("this kernel takes no tracing programs"),))]
    with ExitStack() as stack:
        program = stack.enter_context(compiled())
        captured = stack.enter_context(cgroup(f"peercredd-bench-{os.getpid()}-hook-sets"))

        def start(module: str, *arguments: object) -> _Attachable:
            return stack.enter_context(_Attachable(module, *arguments))

        attachables = {name: [start("bench.loaded", name, captured)] for name in HOOK_SETS}
        missing = _missing_for_tools()
        if not missing:
            attachables[BOTH_TOOLS] = [
                start("bench.bcc_tool", _find(name), *arguments)
                for name, arguments in TOOLS.items()
            ]
        for each in attachables.values():
            for attachable in each:
                attachable.wait_until_loaded()
        rounds = {
            family: _rounds(effort, program, number, captured, {NOTHING: [], **attachables})
            for family, number in FAMILIES.items()
        }
    rows = [row for family, taken in rounds.items() for row in _rows(family, taken)]
    columns = ("task, CPU", "readers, CPU", "elapsed")
    if missing:
        return [Section(TITLE, columns, (*rows, _left_out(missing)))]
    events = tuple(_events(family, taken) for family, taken in rounds.items())
    return [
        Section(TITLE, columns, tuple(rows)),
        Section("Events that reached their readers", ("connections", *TOOLS), events),
    ]


def _rounds(
    effort: Effort,
    program: Path,
    family: str,
    captured: Path,
    attachables: Mapping[str, Sequence[_Attachable]],
) -> Rounds:
    names = list(attachables)
    rounds = []
    with Cycle(program, family, "fin", effort.capture_cycles) as cycle:
        for number in range(effort.capture_rounds):
            # Another one begins each round: none always has the warmer cache.
            first = number % len(names)
            rounds.append(
                {
                    name: _turn(cycle, captured, attachables[name])
                    for name in names[first:] + names[:first]
                }
            )
    return rounds


def _turn(cycle: Cycle, captured: Path, attached: Sequence[_Attachable]) -> _Turn:
    for each in attached:
        each.attach()
    cost = cycle.cost(captured)
    readings = [each.detach() for each in attached]
    seconds = sum(cpu_seconds for cpu_seconds, _ in readings) / cost.connections
    return _Turn(cost, seconds, tuple(events for _, events in readings))


def _rows(family: str, rounds: Rounds) -> list[Row]:
    rows = []
    for name in rounds[0]:
        turns = [taken[name] for taken in rounds]
        values = (
            statistics.median(turn.cost.cpu_seconds for turn in turns),
            statistics.median(turn.reader_seconds for turn in turns),
            statistics.median(turn.cost.elapsed_seconds for turn in turns),
        )
        # Of each round, not of the medians: what else the host does changes over the
        # rounds and touches the turns of one alike. Of the sum: where a reader shares the
        # task's CPU, some of the softirq work is charged to either.
        ratio = statistics.median(
            (taken[name].cost.cpu_seconds + taken[name].reader_seconds)
            / taken[NOTHING].cost.cpu_seconds
            for taken in rounds
        )
        rows.append(Row(f"{family}, {name}", values, Unit.SECONDS, Verdict(ratio)))
    return rows


def _events(family: str, rounds: Rounds) -> Row:
    turns = [taken[BOTH_TOOLS] for taken in rounds]
    connections = sum(turn.cost.connections for turn in turns)
    read = (sum(turn.events[tool] for turn in turns) for tool in range(len(TOOLS)))
    return Row(family, (connections, *read), Unit.COUNT)


def _left_out(reason: str) -> Row:
    return Row(f"left out: {reason}", (), Unit.SECONDS)


def _find(tool: str) -> str | None:
    """Debian renames BCC's tools; others keep them in a folder."""
    return shutil.which(f"{tool}-bpfcc") or shutil.which(tool, path="/usr/share/bcc/tools")


def _missing_for_tools() -> str | None:
    release = platform.release()
    if not all(map(_find, TOOLS)):
        return f"{BOTH_TOOLS}; install bpfcc-tools"
    # Unlike ours, they include them.
    if not any(
        map(os.path.exists, (f"/lib/modules/{release}/build", "/sys/kernel/kheaders.tar.xz"))
    ):
        return f"{BOTH_TOOLS}; install linux-headers-{release}"
    return None
