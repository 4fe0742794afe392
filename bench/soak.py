"""Whether memory stays flat, and every answer right, for as long as the machine is at its limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import click
import psutil

from bench.crowd import Crowd
from bench.cycle import compiled
from bench.daemon import TCP_ADDRESS, Daemon
from bench.effort import Effort
from bench.exerciser import KINDS, Exerciser, Outcomes
from bench.pace import connecting
from bench.table import Row, Section, Target, Unit, Verdict
from bench.trend import trend
from peercredd import pins
from peercredd.libbpf import get_pinned

SAMPLES = 30
SOCKETS = 1_000
CONNECTIONS_PER_SECOND = 500
"""That nobody asks about, besides those of the exercisers."""
USERS = (20_001, 20_002)
EMPTY_SECONDS = 60.0

FLAT = Target(2e6)
"""Bytes in an hour."""
NONE = Target(0)


class _Sample(NamedTuple):
    hours: float
    server_bytes: int
    supervisor_bytes: int
    map_bytes: int
    server_files: int
    supervisor_files: int
    entries: int
    """Of the tables."""


class _Subject:
    """The daemon."""

    def __init__(self, daemon: Daemon) -> None:
        status = daemon.status()
        self._daemon = daemon
        self._pids = status.server_pid, status.daemon_pid
        self._processes = [psutil.Process(pid) for pid in self._pids]
        self._begin = time.monotonic()

    def sample(self) -> _Sample:
        server, supervisor = self._processes
        status = self._daemon.status()
        if status.server_pid != self._pids[0]:
            raise click.ClickException("the server ended and was replaced; see its log")
        return _Sample(
            (time.monotonic() - self._begin) / 3600,
            server.memory_info().rss,
            supervisor.memory_info().rss,
            map_bytes(self._daemon.pin_dir / pins.CAPTURE / pins.MAPS),
            server.num_fds(),
            supervisor.num_fds(),
            sum(table.entries for table in status.tables),
        )


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    """Connections come and go, and everything is asked in every way, as fast as it is answered."""
    seconds = 60 * effort.soak_minutes
    subject = _Subject(daemon)
    with ExitStack() as stack:
        gathered = stack.enter_context(Crowd(daemon.cgroup))
        gathered.grow(SOCKETS)
        program = stack.enter_context(compiled())
        before = subject.sample()
        with ExitStack() as at_work:
            exercisers = [
                at_work.enter_context(Exerciser(address, uid, gathered.questions[0]))
                for address, uid in (
                    (daemon.address, 0),
                    (TCP_ADDRESS, 0),
                    *((TCP_ADDRESS, uid) for uid in USERS),
                )
            ]
            with connecting(program, daemon.cgroup, CONNECTIONS_PER_SECOND) as pace:
                for exerciser in exercisers:
                    exerciser.start(seconds)
                samples = _samples(subject, seconds)
                outcomes = [exerciser.finish() for exerciser in exercisers]
        after = _afterwards(subject, before)
    return [
        _flat(effort.soak_minutes, samples),
        _counts(samples, before, after),
        _by_time(samples),
        _answers(outcomes, seconds, pace.connections),
    ]


def map_bytes(folder: Path) -> int:
    """What the kernel keeps in memory for the maps that are pinned there."""
    total = 0
    for pinned in folder.iterdir():
        descriptor = get_pinned(pinned)
        try:
            fields = dict(
                line.split(":", 1)
                for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
            )
            total += int(fields["memlock"])
        finally:
            os.close(descriptor)
    return total


def _samples(subject: _Subject, seconds: float) -> list[_Sample]:
    begin = time.monotonic()
    samples = []
    for number in range(SAMPLES + 1):
        # The first when all are at work.
        time.sleep(max(0, begin + max(1, number * seconds / SAMPLES) - time.monotonic()))
        sample = subject.sample()
        samples.append(sample)
        click.echo(
            f"{60 * sample.hours:5.1f} min: server {sample.server_bytes / 1e6:.2f} MB, "
            f"supervisor {sample.supervisor_bytes / 1e6:.2f} MB, "
            f"maps {sample.map_bytes / 1e6:.2f} MB, "
            f"files {sample.server_files} + {sample.supervisor_files}, "
            f"{sample.entries:,} entries",
            err=True,
        )
    return samples


def _afterwards(subject: _Subject, before: _Sample) -> _Sample:
    """When no more is left than there was, or it stays for too long."""
    deadline = time.monotonic() + EMPTY_SECONDS
    while True:
        sample = subject.sample()
        left = zip(_countable(sample), _countable(before), strict=True)
        if all(now <= then for now, then in left) or time.monotonic() > deadline:
            return sample
        time.sleep(0.1)


def _countable(sample: _Sample) -> tuple[int, int, int]:
    return sample.server_files, sample.supervisor_files, sample.entries


def _flat(minutes: float, samples: Sequence[_Sample]) -> Section:
    def row(name: str, figure: Callable[[_Sample], float]) -> Row:
        seen = trend([each.hours for each in samples], [figure(each) for each in samples])
        return Row(name, seen, Unit.BYTES, Verdict(seen.per_hour, Unit.BYTES, FLAT))

    return Section(
        f"Memory over {minutes:g} minutes",
        ("start", "end", "most", "an hour"),
        (
            row("server, RSS", lambda sample: sample.server_bytes),
            row("supervisor, RSS", lambda sample: sample.supervisor_bytes),
            row("BPF maps, in the kernel", lambda sample: sample.map_bytes),
        ),
    )


def _counts(samples: Sequence[_Sample], before: _Sample, after: _Sample) -> Section:
    def row(name: str, figure: Callable[[_Sample], float]) -> Row:
        seen = [figure(each) for each in samples]
        left = figure(after) - figure(before)
        values = (figure(before), max(seen), seen[-1], figure(after))
        return Row(name, values, Unit.COUNT, Verdict(left, Unit.COUNT, NONE))

    return Section(
        "Left behind",
        ("before", "most", "end", "afterwards"),
        (
            row("server, files open", lambda sample: sample.server_files),
            row("supervisor, files open", lambda sample: sample.supervisor_files),
            row("entries of the tables", lambda sample: sample.entries),
        ),
    )


def _by_time(samples: Sequence[_Sample]) -> Section:
    rows = (
        Row(
            f"after {60 * each.hours:.1f} minutes",
            (each.server_bytes, each.supervisor_bytes, each.map_bytes),
            Unit.BYTES,
        )
        for each in samples
    )
    return Section("Memory by time", ("server", "supervisor", "BPF maps"), tuple(rows))


def _answers(outcomes: Sequence[dict[str, Outcomes]], seconds: float, connections: int) -> Section:
    rows = [
        Row(
            "connections that nobody asked about",
            (None,) * 3 + (connections / seconds,),
            Unit.COUNT,
        )
    ]
    for kind in KINDS:
        right, wrong, failed = (
            sum(column) for column in zip(*(each[kind] for each in outcomes), strict=True)
        )
        values = (right, wrong, failed, right / seconds)
        verdict = Verdict(wrong + failed, Unit.COUNT, NONE)
        rows.append(Row(kind, values, Unit.COUNT, verdict))
    return Section("Answers", ("right", "wrong", "none", "a second"), tuple(rows))
