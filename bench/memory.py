"""What the daemon's two processes keep resident, the server and its supervisor."""

from __future__ import annotations

import psutil

from bench.callers import callers, stretch
from bench.crowd import Crowd
from bench.daemon import Daemon
from bench.effort import Effort
from bench.table import Row, Section, Target, Unit, Verdict

TARGET_BYTES = 70e6
"""Of both together: each has a Python of its own."""
CALLERS = 4


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    """After the start, and after a load of every kind of call."""
    status = daemon.status()
    processes = [psutil.Process(pid) for pid in (status.server_pid, status.daemon_pid)]
    rows = [_row("After the start", processes)]
    sockets = effort.open_sockets[-1]
    with Crowd(daemon.cgroup) as gathered:
        gathered.grow(sockets)
        with callers(CALLERS, daemon.address, gathered.questions) as started:
            for kind in ("lookup", "batch", "stream"):
                stretch(started, kind, effort.seconds_per_method)
            rows.append(_row(f"{sockets:,} open sockets, {CALLERS} callers", processes))
    return [Section("Memory of server and supervisor", ("RSS", "PSS"), tuple(rows))]


def _row(name: str, processes: list[psutil.Process]) -> Row:
    memory = [process.memory_full_info() for process in processes]
    rss, pss = sum(each.rss for each in memory), sum(each.pss for each in memory)
    verdict = Verdict(rss, Unit.BYTES, Target(TARGET_BYTES))
    return Row(name, (rss, pss), Unit.BYTES, verdict)
