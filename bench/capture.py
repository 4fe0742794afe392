"""What capture adds to a connection: CPU time of connect, accept and close."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from bench.cycle import Cost, Cycle, compiled
from bench.daemon import Daemon, cgroup
from bench.effort import Effort
from bench.table import Row, Section, Target, Unit, Verdict

TARGET = Target(1.20)
CYCLES = {
    "IPv4": ("4", "fin"),
    "IPv6": ("6", "fin"),
    "IPv4, closed by reset": ("4", "reset"),
    "IPv6, closed by reset": ("6", "reset"),
}


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    """Same task, same CPU, in turns in a captured cgroup and in one that is not."""
    rows = []
    with compiled() as program, cgroup(f"peercredd-bench-{os.getpid()}-bare") as bare:
        for name, kind in CYCLES.items():
            with Cycle(program, *kind, effort.capture_cycles) as cycle:
                rows.append(_row(name, cycle, effort.capture_rounds, bare, daemon.cgroup))
    columns = ("bare, CPU", "captured, CPU", "bare, elapsed", "captured, elapsed")
    return [Section("One connect + accept + close + close", columns, tuple(rows))]


def _row(name: str, cycle: Cycle, rounds: int, bare: Path, captured: Path) -> Row:
    costs: dict[Path, list[Cost]] = {bare: [], captured: []}
    for turn in range(rounds):
        # Who goes first alternates: neither side always has the warmer cache.
        for each in (bare, captured) if turn % 2 else (captured, bare):
            costs[each].append(cycle.cost(each))
    # Of each pair, not of the medians: what else the host does changes over the
    # rounds and touches both halves of a pair alike.
    ratio = statistics.median(
        taken.cpu_seconds / free.cpu_seconds
        for free, taken in zip(costs[bare], costs[captured], strict=True)
    )
    values = (
        *(statistics.median(cost.cpu_seconds for cost in costs[each]) for each in (bare, captured)),
        *(
            statistics.median(cost.elapsed_seconds for cost in costs[each])
            for each in (bare, captured)
        ),
    )
    return Row(name, values, Unit.SECONDS, Verdict(ratio, target=TARGET))
