"""What it costs that somebody watches, and whether watchers are told of everything."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import psutil

from bench.crowd import Crowd
from bench.cycle import compiled
from bench.daemon import Daemon
from bench.effort import Effort
from bench.modest import RIGHT_OR_NOT, Modest, Taken, answers, title
from bench.pace import connecting
from bench.table import Row, Section, Target, Unit, Verdict
from bench.timing import percentile
from bench.watcher import Watchers

EVENTS_PER_SECOND = 10_000
"""Over all watchers. A connection is two events to each: that it is established, and retired."""
CROWDS = (1, 10)
"""Of watchers."""
CALLERS = (1, 8, 64)
"""At the same time."""
SOCKETS = 1_000
LATEST_SECONDS = 15.0
"""Until what is told late counts as lost."""

ENOUGH = Target(0.95 * EVENTS_PER_SECOND, at_least=True)
NONE = Target(0)


class _Stretch(NamedTuple):
    taken: Taken
    server_load: float
    """CPU seconds of the server in a second."""
    due: int
    """Events that watchers had to be told."""
    told: int
    missed: int
    """Connections of which the daemon said that they could not be told."""
    seconds: float


class _Site(NamedTuple):
    daemon: Daemon
    program: Path
    server: psutil.Process
    watchers: Watchers
    callers: Modest


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    """In turns: connections come and go while nobody watches, and while somebody does."""
    sections = []
    with ExitStack() as stack:
        gathered = stack.enter_context(Crowd(daemon.cgroup))
        gathered.grow(SOCKETS)
        site = _Site(
            daemon,
            stack.enter_context(compiled()),
            psutil.Process(daemon.status().server_pid),
            stack.enter_context(Watchers(daemon.address)),
            stack.enter_context(Modest(daemon.address, os.geteuid(), gathered.questions)),
        )
        for watchers in CROWDS:
            seen = {callers: _rounds(effort, site, watchers, callers) for callers in CALLERS}
            sections += _sections(watchers, seen)
    return sections


def _rounds(effort: Effort, site: _Site, watchers: int, callers: int) -> dict[int, list[_Stretch]]:
    stretches = defaultdict(list)
    for number in range(effort.watch_rounds):
        for each in (0, watchers) if number % 2 else (watchers, 0):
            stretches[each].append(
                _stretch(
                    site, each, callers, EVENTS_PER_SECOND / 2 / watchers, effort.watch_seconds
                )
            )
    return stretches


def _stretch(
    site: _Site, watchers: int, callers: int, per_second: float, seconds: float
) -> _Stretch:
    site.watchers.watch(watchers)
    with connecting(site.program, site.daemon.cgroup, per_second) as pace:
        before = site.server.cpu_times()
        taken = site.callers.ask("live", callers, seconds)
        after = site.server.cpu_times()
    due = 2 * pace.connections * watchers
    told, missed = site.watchers.until(due, LATEST_SECONDS)
    site.watchers.end()
    return _Stretch(
        taken,
        (after.user + after.system - before.user - before.system) / seconds,
        due,
        told,
        missed,
        pace.seconds,
    )


def _sections(watchers: int, seen: dict[int, dict[int, list[_Stretch]]]) -> list[Section]:
    who = "1 watcher" if watchers == 1 else f"{watchers} watchers"
    each_second = EVENTS_PER_SECOND // 2 // watchers
    rows = [
        row
        for callers, stretches in seen.items()
        for row in _rows(callers, stretches[0], stretches[watchers])
    ]
    alone, watched = (
        [each for stretches in seen.values() for each in stretches[number]]
        for number in (0, watchers)
    )
    return [
        Section(
            f"{each_second:,} connections a second, {who}",
            ("nobody watches", "watched"),
            tuple(rows),
        ),
        Section(
            "Answers",
            RIGHT_OR_NOT,
            (
                answers("nobody watches", [each.taken for each in alone]),
                answers("watched", [each.taken for each in watched]),
            ),
        ),
        Section(f"Told to {who}, or lost silently", ("due", "told", "said missed"), _told(watched)),
    ]


def _rows(callers: int, alone: Sequence[_Stretch], watched: Sequence[_Stretch]) -> Iterator[Row]:
    figures: dict[str, tuple[Unit, Callable[[_Stretch], float]]] = {
        "Lookup": (Unit.PER_SECOND, lambda each: each.taken.per_second),
        "Lookup, median": (Unit.SECONDS, lambda each: statistics.median(each.taken.times)),
        "Lookup, p99": (Unit.SECONDS, lambda each: percentile(99, each.taken.times)),
        "server's CPU in a second": (Unit.SECONDS, lambda each: each.server_load),
    }
    for what, (unit, figure) in figures.items():
        values = [[figure(each) for each in side] for side in (alone, watched)]
        # Of each pair, not of the medians: what else the host does touches both alike.
        ratio = statistics.median(b / a for a, b in zip(*values, strict=True))
        medians = tuple(map(statistics.median, values))
        yield Row(f"{title(callers)}: {what}", medians, unit, Verdict(ratio))


def _told(watched: Sequence[_Stretch]) -> tuple[Row, ...]:
    due, told, missed = (sum(getattr(each, field) for each in watched) for field in _COUNTS)
    rate = statistics.median(each.told / each.seconds for each in watched)
    # Who is not told that a connection is established is not told that it is retired.
    silently = max(0, due - told - 2 * missed)
    return (
        Row("events", (due, told, missed), Unit.COUNT, Verdict(silently, Unit.COUNT, NONE)),
        Row(
            "told in a second",
            (None, rate),
            Unit.PER_SECOND,
            Verdict(rate, Unit.PER_SECOND, ENOUGH),
        ),
    )


_COUNTS = ("due", "told", "missed")
