"""How long to measure: every count and time of a run."""

from __future__ import annotations

from typing import NamedTuple


class Effort(NamedTuple):
    """The defaults are those of a full run."""

    capture_cycles: int = 2_000
    """Connections in one timed stretch."""
    capture_rounds: int = 30
    """Pairs of stretches, bare and captured."""
    getsockopt_calls: int = 50_000
    """In one timed stretch."""
    getsockopt_rounds: int = 60
    open_sockets: tuple[int, ...] = (10, 1_000, 10_000, 50_000)
    seconds_per_method: float = 3.0
    """For one way of looking up, at one number of open sockets."""
    gone_clients: int = 1_000
    call_seconds: float = 0.25
    """One stretch of gRPC calls of one kind."""
    call_rounds: int = 20
    """Stretches of each kind, taken in turns."""
    starts: int = 5
    policy_seconds: float = 0.5
    """One stretch of calls with policy on, or off."""
    policy_rounds: int = 6
    """With each number of callers, of each server process."""
    policy_servers: int = 10
    secret_calls: int = 5_000
    """Lookups of what is there, and as many of what is not."""
    flood_seconds: float = 0.5
    """One stretch of calls, alone or under flood."""
    flood_rounds: int = 20
    watch_seconds: float = 3.0
    """One stretch of calls, with watchers or without."""
    watch_rounds: int = 6
    soak_minutes: int = 30


FULL = Effort()
QUICK = Effort(
    capture_cycles=500,
    capture_rounds=6,
    getsockopt_rounds=6,
    open_sockets=(10, 1_000),
    seconds_per_method=0.3,
    gone_clients=50,
    call_seconds=0.1,
    call_rounds=8,
    starts=2,
    policy_seconds=0.2,
    policy_rounds=3,
    policy_servers=2,
    secret_calls=500,
    flood_seconds=0.2,
    flood_rounds=4,
    watch_seconds=1.0,
    watch_rounds=2,
    soak_minutes=1,
)
