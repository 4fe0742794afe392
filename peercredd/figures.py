"""What the daemon counts of its own work."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

FOUND: Final = "FOUND"
"""The outcome of a lookup that was answered; all others are reasons of the API."""

BOUNDS_SECONDS: Final = (
    *(0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005),
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
)
"""Upper ends of the histogram's buckets; behind the last one there is one more."""


class Durations:
    """How long calls of one method took, as a histogram."""

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS_SECONDS) + 1)
        """How many calls took at most as long as its bound, and longer than the one before."""
        self.sum_seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one call."""
        self.buckets[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self.sum_seconds += seconds


class Figures:
    """Since the daemon began to serve. For one thread to write; others may read."""

    def __init__(self) -> None:
        self.lookups: Counter[str] = Counter()
        """Keys looked up, by outcome: `FOUND`, or the reason why not."""
        self.calls: dict[str, Durations] = {}
        """By method: calls that have one answer, from the arrival of their message to that."""

    @contextmanager
    def timing(self, method: str) -> Iterator[None]:
        """Count how long the answer to a call takes, whatever it is."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.calls.setdefault(method, Durations()).add(time.perf_counter() - began)
