"""What one user's lookups are worth while another one floods the tables with connections."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.daemon import TCP_ADDRESS, Daemon
from bench.effort import Effort
from bench.flooder import Flooder
from bench.modest import RIGHT_OR_NOT, Modest, Taken, answers, title
from bench.table import Row, Section, Target, Unit, Verdict
from bench.timing import percentile
from peercred.v1 import peer_credentials_pb2 as pb

USER, FLOODING_USER = 20_000, 30_000
CALLERS = (1, 8, 64)
"""At the same time."""
TABLE = 32_768
"""Connections that there is room for. A quarter is one user's, and as many as one process may hold
where it may have 20,000 files open."""
ALONE, SPIN, FLOOD = "alone", "beside a busy loop", "under flood"
BESIDE = {ALONE: None, SPIN: "spin", FLOOD: "flood"}
NONE = Target(0)
OVER_SHARE = "USER_OVER_SHARE"


class _Stretch(NamedTuple):
    taken: Taken
    connects_per_second: float
    dropped: int
    """Connections of who had its share."""
    others_dropped: int
    """For any other reason."""


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    """Each question is about a connection that was made for it, under flood if there is one.

    In turns: alone, beside a process that takes a CPU as the flood does, and under flood by a
    user who has all of its share of the table.
    """
    share = next(
        table.max_entries_per_user
        for table in daemon.status().tables
        if table.name == "connections"
    )
    with Modest(TCP_ADDRESS, USER, []) as modest, Flooder(FLOODING_USER, share) as flooder:
        seen = {callers: _rounds(effort, daemon, modest, flooder, callers) for callers in CALLERS}
    rows = [row for callers, stretches in seen.items() for row in _rows(callers, stretches)]
    stretches = {name: [each for by in seen.values() for each in by[name]] for name in BESIDE}
    return [
        Section("Lookups of new connections", tuple(BESIDE), tuple(rows)),
        Section(
            "Answers",
            RIGHT_OR_NOT,
            tuple(answers(name, [each.taken for each in stretches[name]]) for name in BESIDE),
        ),
        _the_flood(share, stretches[FLOOD]),
    ]


def _rounds(
    effort: Effort, daemon: Daemon, modest: Modest, flooder: Flooder, callers: int
) -> dict[str, list[_Stretch]]:
    stretches: dict[str, list[_Stretch]] = defaultdict(list)
    for number in range(effort.flood_rounds):
        names = list(BESIDE)
        # Another one begins each round: none always has the warmer cache.
        first = number % len(names)
        for name in names[first:] + names[:first]:
            stretches[name].append(
                _stretch(daemon, modest, flooder, callers, BESIDE[name], effort.flood_seconds)
            )
    return stretches


def _stretch(
    daemon: Daemon,
    modest: Modest,
    flooder: Flooder,
    callers: int,
    beside: str | None,
    seconds: float,
) -> _Stretch:
    before = _drops(daemon.status())
    if beside:
        flooder.start(beside, seconds)
    taken = modest.ask("new", callers, seconds)
    times = flooder.finish() if beside else 0.0
    dropped = _drops(daemon.status()) - before
    return _Stretch(taken, times, dropped[OVER_SHARE], dropped.total() - dropped[OVER_SHARE])


def _drops(status: pb.GetStatusResponse) -> Counter[str]:
    return Counter({drop.reason: drop.count for drop in status.drops})


def _rows(callers: int, stretches: dict[str, list[_Stretch]]) -> tuple[Row, ...]:
    def row(what: str, unit: Unit, figure: Callable[[Taken], float]) -> Row:
        figures = {name: [figure(each.taken) for each in stretches[name]] for name in BESIDE}
        # Of each round, not of the medians: what else the host does touches both alike.
        ratio = statistics.median(
            flood / alone for alone, flood in zip(figures[ALONE], figures[FLOOD], strict=True)
        )
        values = tuple(statistics.median(figures[name]) for name in BESIDE)
        return Row(f"{title(callers)}: {what}", values, unit, Verdict(ratio))

    return (
        row("rate", Unit.PER_SECOND, lambda taken: taken.per_second),
        row("median", Unit.SECONDS, lambda taken: statistics.median(taken.times)),
        row("p99", Unit.SECONDS, lambda taken: percentile(99, taken.times)),
    )


def _the_flood(share: int, flooded: Sequence[_Stretch]) -> Section:
    rate = statistics.median(each.connects_per_second for each in flooded)
    dropped = sum(each.dropped for each in flooded)
    others = sum(each.others_dropped for each in flooded)
    return Section(
        "The flood",
        ("held", "a second", "dropped", "others dropped"),
        (
            Row(
                "connections",
                (share, rate, dropped, others),
                Unit.COUNT,
                Verdict(others, Unit.COUNT, NONE),
            ),
        ),
    )
