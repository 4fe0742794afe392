"""What it costs that the daemon asks who calls, and keeps to itself what is not the caller's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import psutil

from bench.child import Child
from bench.crowd import FIRST_UID, Crowd
from bench.daemon import Daemon
from bench.effort import Effort
from bench.modest import Modest, Taken, title
from bench.policed import WITH_POLICY, WITHOUT
from bench.table import Row, Section, Target, Unit, Verdict
from bench.timing import percentile

CALLERS = (1, 8, 64)
"""At the same time. 64 are as many as one user may have."""
SOCKETS = 1_000
COST = Target(1.05)
OFF, ALL, OWN = "off", "on, sees all", "on, sees its own"


class _Stretch(NamedTuple):
    taken: Taken
    cpu_seconds: float
    """Of the server."""


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    """The same calls on two ports of one server process, in turns; and of another one, and so on.

    Off: a user's calls are let through to the whole table. On: the same user's are, as the
    daemon does it, admitted and answered with what is its own; and root's, who sees all.
    """
    with ExitStack() as stack:
        gathered = stack.enter_context(Crowd(daemon.cgroup))
        gathered.grow(SOCKETS)
        asking = {
            name: stack.enter_context(Modest(f"127.0.0.1:{port}", uid, gathered.questions))
            for name, port, uid in (
                (OFF, WITHOUT, FIRST_UID),
                (ALL, WITH_POLICY, 0),
                (OWN, WITH_POLICY, FIRST_UID),
            )
        }
        rounds: dict[int, list[dict[str, _Stretch]]] = {callers: [] for callers in CALLERS}
        # Where things lie in a process favours one port or the other, by some per cent.
        for _ in range(effort.policy_servers):
            with Child("bench.policed", daemon.pin_dir) as server:
                server.hear()
                process = psutil.Process(server.pid)
                for callers in CALLERS:
                    rounds[callers] += _rounds(effort, callers, asking, process)
        rows = [row for callers in CALLERS for row in _rows(callers, rounds[callers])]
    return [Section("Lookup over loopback TCP, policy", tuple(asking), tuple(rows))]


def _rounds(
    effort: Effort, callers: int, asking: dict[str, Modest], server: psutil.Process
) -> list[dict[str, _Stretch]]:
    names = list(asking)
    rounds = []
    for number in range(effort.policy_rounds):
        # Another one begins each round: none always has the warmer cache.
        first = number % len(names)
        taken = {}
        for name in names[first:] + names[:first]:
            before = server.cpu_times()
            seen = asking[name].ask("live", callers, effort.policy_seconds)
            after = server.cpu_times()
            cpu_seconds = after.user + after.system - before.user - before.system
            taken[name] = _Stretch(seen, cpu_seconds)
        rounds.append(taken)
    return rounds


def _rows(callers: int, rounds: Sequence[dict[str, _Stretch]]) -> list[Row]:
    def row(what: str, unit: Unit, values: Sequence[float], ratio: float, target: bool) -> Row:
        verdict = Verdict(ratio, target=COST if target else None)
        return Row(f"{title(callers)}: {what}", tuple(values), unit, verdict)

    names = (OFF, ALL, OWN)
    stretches = {name: [taken[name] for taken in rounds] for name in names}
    rates = {name: [each.taken.per_second for each in stretches[name]] for name in names}
    medians = {
        name: [statistics.median(each.taken.times) for each in stretches[name]] for name in names
    }
    slow = [
        percentile(99, [time for each in stretches[name] for time in each.taken.times])
        for name in names
    ]
    cpu = [
        sum(each.cpu_seconds for each in stretches[name])
        / sum(len(each.taken.times) for each in stretches[name])
        for name in names
    ]
    return [
        row(
            "rate, off to own",
            Unit.PER_SECOND,
            [statistics.median(rates[name]) for name in names],
            _of_pairs(rates[OWN], rates[OFF]),
            target=True,
        ),
        row(
            "median, own to off",
            Unit.SECONDS,
            [statistics.median(medians[name]) for name in names],
            _of_pairs(medians[OFF], medians[OWN]),
            target=True,
        ),
        row("p99, own to off", Unit.SECONDS, slow, slow[2] / slow[0], target=False),
        row("server's CPU for each", Unit.SECONDS, cpu, cpu[2] / cpu[0], target=False),
    ]


def _of_pairs(below: Sequence[float], above: Sequence[float]) -> float:
    # Of each pair, not of the medians: what else the host does touches both alike.
    return statistics.median(a / b for b, a in zip(below, above, strict=True))
