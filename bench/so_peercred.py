"""What getsockopt(SO_PEERCRED) costs on TCP, and what other calls of getsockopt pay for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click

from bench.cycle import compiled
from bench.daemon import Daemon, cgroup
from bench.effort import Effort
from bench.table import Row, Section, Target, Unit, Verdict
from peercredd import pins
from peercredd.hooks import SO_PEERCRED
from peercredd.libbpf import get_pinned

SOURCE = Path(__file__).with_suffix(".c")
UNIX, SERVER, CLIENT = "SO_PEERCRED, AF_UNIX", "SO_PEERCRED, TCP server", "SO_PEERCRED, TCP client"
OTHERS = ("SO_TYPE, TCP", "TCP_NODELAY, TCP")
KINDS = (UNIX, SERVER, CLIENT, *OTHERS)
"""In the order of `kinds` in bench/so_peercred.c."""

TO_UNHOOKED = Target(1.85)
TO_HOOKED = Target(1.0)
ELSEWHERE = Target(1.02)
"""That is x1.00: times of equal things still differ by so much."""


class Place(NamedTuple):
    """A cgroup to call getsockopt in, and whether our program is attached to the captured one."""

    name: str
    cgroup: Path
    is_attached: bool


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    """Same CPU; in each round once with nothing attached, in the hooked cgroup, and in another.

    A round's figure is its shortest stretch, as calls this short are only ever lengthened by what
    else the machine does; and of the rounds' the median counts, as in one of them the whole CPU
    may have been faster.
    """
    with (
        compiled(SOURCE) as program,
        cgroup(f"peercredd-bench-{os.getpid()}-other") as other,
        _calls(program, effort.getsockopt_calls) as times_in,
    ):
        places = (
            Place("unhooked", daemon.cgroup, False),
            Place("hooked cgroup", daemon.cgroup, True),
            Place("another cgroup", other, True),
        )
        rounds: dict[str, list[list[float]]] = {place.name: [] for place in places}
        for number in range(effort.getsockopt_rounds):
            # Another one begins each round: none always has the warmer cache.
            first = number % len(places)
            for place in places[first:] + places[:first]:
                with _attached(daemon) if place.is_attached else nullcontext():
                    rounds[place.name].append(times_in(place.cgroup))
    unhooked, hooked, elsewhere = (
        dict(zip(KINDS, map(median, zip(*taken, strict=True)), strict=True))
        for taken in rounds.values()
    )
    columns = tuple(place.name for place in places)
    times = tuple(
        Row(kind, (unhooked[kind], hooked[kind], elsewhere[kind]), Unit.SECONDS) for kind in KINDS
    )
    return [Section("One getsockopt", columns, times), _ratios(unhooked, hooked, elsewhere)]


def _ratios(
    unhooked: dict[str, float], hooked: dict[str, float], elsewhere: dict[str, float]
) -> Section:
    def row(name: str, figure: float, target: Target | None = None) -> Row:
        return Row(name, (), Unit.RATIO, Verdict(figure, target=target))

    return Section(
        "Ratios of these",
        (),
        (
            *(
                row(f"{kind} hooked : AF_UNIX unhooked", hooked[kind] / unhooked[UNIX], TO_UNHOOKED)
                for kind in (SERVER, CLIENT)
            ),
            *(
                row(f"{kind} hooked : AF_UNIX hooked", hooked[kind] / hooked[UNIX], TO_HOOKED)
                for kind in (SERVER, CLIENT)
            ),
            *(
                row(f"{kind} hooked : unhooked", hooked[kind] / unhooked[kind])
                for kind in (UNIX, *OTHERS)
            ),
            *(
                row(f"{kind} elsewhere : unhooked", elsewhere[kind] / unhooked[kind], ELSEWHERE)
                for kind in KINDS
            ),
        ),
    )


@contextmanager
def _calls(program: Path, calls: int) -> Iterator[Callable[[Path], list[float]]]:
    """A process of the program; what it is called with is where it measures."""
    with subprocess.Popen(
        [program, str(calls)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C is for the benchmark, which ends its children in their order.
        process_group=0,
    ) as process:

        def times_in(cgroup: Path) -> list[float]:
            assert process.stdin is not None
            assert process.stdout is not None
            print(cgroup, file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                raise click.ClickException("bench/so_peercred.c failed; its message is above")
            return [float(figure) / 1e9 for figure in line.split()]

        yield times_in


@contextmanager
def _attached(daemon: Daemon) -> Iterator[None]:
    """Our program, on the cgroup that the daemon captures, as the daemon would attach it."""
    program = get_pinned(daemon.pin_dir / pins.CAPTURE / pins.PROGRAMS / SO_PEERCRED.name)
    directory = os.open(daemon.cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    link = SO_PEERCRED.attach(program, directory)
    try:
        yield
    finally:
        for descriptor in (link, directory, program):
            os.close(descriptor)
