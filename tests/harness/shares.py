"""What the kernel side counts against users' shares of the tables."""

from __future__ import annotations

import os
import struct
import time
from contextlib import closing
from typing import NamedTuple

from harness.daemon import EMPTY_SECONDS, Daemon, open_map
from peercredd import records
from peercredd.records import Holdings


class Charged(NamedTuple):
    """All that is counted, without those who have nothing."""

    users: dict[int, Holdings]
    """By uid."""
    left: dict[tuple[int, ...], int]
    """How many connections are kept whose clients have gone, by the uids of client and listener."""


NOTHING = Charged({}, {})


def charged(daemon: Daemon) -> Charged:
    """What is counted now."""
    users = _counts(daemon, "users", records.UID, records.USER)
    left = _counts(daemon, "left", records.PAIR, records.LEFT)
    return Charged(
        {uid: Holdings(*counts) for (uid,), counts in users.items()},
        {pair: count for pair, (count,) in left.items()},
    )


def _counts(
    daemon: Daemon, name: str, key: struct.Struct, value: struct.Struct
) -> dict[tuple[int, ...], tuple[int, ...]]:
    found = {}
    with (
        closing(open_map(daemon, name)) as counts,
        closing(open_map(daemon, f"{name}_over")) as over,
    ):
        for who, count in counts.items():
            wrong = value.unpack(over.lookup(who) or bytes(value.size))
            true = tuple(a - b for a, b in zip(value.unpack(count), wrong, strict=True))
            if any(true):
                found[key.unpack(who)] = true
    return found


def wait_until(daemon: Daemon, expected: Charged) -> None:
    """Wait until that is what is counted; raises AssertionError that says what is instead.

    The kernel side removes an entry first and gives back then.
    """
    deadline = time.monotonic() + EMPTY_SECONDS
    while (found := charged(daemon)) != expected:
        assert time.monotonic() < deadline, f"counted: {found}, not {expected}"
        os.sched_yield()
