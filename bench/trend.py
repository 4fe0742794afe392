"""How a figure went over time: whether it is flat."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

SETTLED = 1 / 3
"""Of the time, at its beginning, that says nothing: caches and pools fill."""


class Trend(NamedTuple):
    """Of one figure."""

    start: float
    end: float
    most: float
    per_hour: float
    """Slope of the line through what was seen once it had settled."""


def trend(hours: Sequence[float], figures: Sequence[float]) -> Trend:
    """Of figures that were read at those times; at least three."""
    settled = hours[0] + SETTLED * (hours[-1] - hours[0])
    seen = [(hour, figure) for hour, figure in zip(hours, figures, strict=True) if hour >= settled]
    slope, _ = statistics.linear_regression(*zip(*seen, strict=True))
    return Trend(figures[0], figures[-1], max(figures), slope)
