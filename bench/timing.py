"""The time of one call: a median, within a budget; and the slowest of many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

FEWEST_CALLS = 3

T = TypeVar("T")


def median_seconds(budget: float, *calls: tuple[Callable[[T], object], Iterator[T]]) -> list[float]:
    """Median time of each call over its endless arguments, until `budget` seconds are spent.

    The calls are made in turns: what else the host does touches them alike. The
    first of each warms up and does not count. However slow, three of each do.
    """
    for call, arguments in calls:
        call(next(arguments))
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times[-1]) < FEWEST_CALLS:
        for (call, arguments), spent in zip(calls, times, strict=True):
            argument = next(arguments)
            start = time.perf_counter()
            call(argument)
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in times]


def percentile(percent: int, times: Sequence[float]) -> float:
    """The time that so many percent of the calls took at most."""
    ranked = sorted(times)
    return ranked[max(0, -(-len(ranked) * percent // 100) - 1)]
