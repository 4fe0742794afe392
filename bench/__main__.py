"""``python -m bench``: measure, and print one table."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
from collections.abc import Callable
from pathlib import Path

import click
from pyroute2 import IPRoute
from rich.console import Console

from bench import (
    capture,
    flood,
    hook_sets,
    lookups,
    memory,
    policy,
    secrecy,
    servers,
    so_peercred,
    soak,
    startup,
    watchers,
)
from bench.daemon import Daemon, running
from bench.effort import FULL, QUICK, Effort
from bench.table import Section, as_json, render

CLONE_NEWNET = 0x40000000
WIDTH = 160


def _on_a_daemon(
    measure: Callable[[Effort, Daemon], list[Section]], *options: str, tcp: bool = False
) -> Callable[[Effort], list[Section]]:
    def on_a_fresh_one(effort: Effort) -> list[Section]:
        with running(*options, tcp=tcp) as daemon:
            return measure(effort, daemon)

    return on_a_fresh_one


MEASUREMENTS: dict[str, Callable[[Effort], list[Section]]] = {
    # Only `cgroup` leaves the connections of other cgroups alone.
    "capture": _on_a_daemon(capture.measure, "--hooks", "cgroup"),
    "hook-sets": hook_sets.measure,
    "so-peercred": _on_a_daemon(so_peercred.measure),
    "lookups": lookups.measure,
    "servers": _on_a_daemon(servers.measure),
    "policy": _on_a_daemon(policy.measure),
    "secrecy": _on_a_daemon(secrecy.measure, tcp=True),
    "flood": _on_a_daemon(flood.measure, "--max-connections", str(flood.TABLE), tcp=True),
    "watchers": _on_a_daemon(watchers.measure),
    "memory": _on_a_daemon(memory.measure),
    "startup": startup.measure,
    "soak": _on_a_daemon(soak.measure, tcp=True),
}
ONLY_IF_ASKED_FOR = ("soak",)
"""It takes half an hour."""


@click.command()
@click.option("--quick", is_flag=True, help="Seconds instead of minutes; rough figures.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(MEASUREMENTS)),
    help="Measure this alone. May be repeated. soak is measured only if it is named.",
)
@click.option(
    "--minutes",
    type=click.IntRange(min=1),
    help=f"How long to soak. Default: {FULL.soak_minutes}; with --quick {QUICK.soak_minutes}.",
)
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the figures there too, in seconds, bytes and counts.",
)
def main(quick: bool, only: tuple[str, ...], minutes: int | None, file: Path | None) -> None:
    """Measure peercredd against doing without it, and against its rivals.

    Prints one table. Needs root: it loads BPF programs, bounded to cgroups of its own, and
    works in a network namespace of its own. Where the kernel lets programs trace it, "hook-sets"
    compares some that see the whole host. "soak" is no part of a run without --only: it keeps
    the machine at its limit for half an hour.
    """
    if os.geteuid() != 0:
        raise click.ClickException("the benchmark loads BPF programs: run it as root")
    signal.signal(signal.SIGTERM, _unwind)
    _enter_own_network()
    load = os.getloadavg()[0]
    effort = QUICK if quick else FULL
    if minutes is not None:
        effort = effort._replace(soak_minutes=minutes)
    console = Console(stderr=True)
    sections: list[Section] = []
    for name in only or [each for each in MEASUREMENTS if each not in ONLY_IF_ASKED_FOR]:
        with console.status(f"measuring {name}"):
            sections += MEASUREMENTS[name](effort)
    # Whole, also where the output is a file or a narrow window.
    Console(width=WIDTH).print(render(sections, _machine(load)))
    if file is not None:
        file.write_text(
            json.dumps({"machine": _machine(load), "sections": as_json(sections)}, indent=2) + "\n"
        )


def _enter_own_network() -> None:
    """Other sockets of the host would be in every rival's way, and ours in the host's."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    with IPRoute() as route:
        route.link("set", ifname="lo", state="up")


def _machine(load: float) -> str:
    return (
        f"Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, "
        f"load average at the start {load:.1f}"
    )


def _unwind(number: int, _: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main(prog_name="./dev bench")
