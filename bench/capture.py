"""What capture adds to a connection: CPU time of connect, accept and close."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import click

from bench.daemon import Daemon, cgroup
from bench.effort import Effort
from bench.table import Row, Section, Target, Unit, Verdict

SOURCE = Path(__file__).with_name("cycle.c")
TARGET = Target(1.20)
CYCLES = {
    "IPv4": ("4", "fin"),
    "IPv6": ("6", "fin"),
    "IPv4, closed by reset": ("4", "reset"),
    "IPv6, closed by reset": ("6", "reset"),
}


def measure(effort: Effort, daemon: Daemon) -> list[Section]:
    """Same task, same CPU, in turns in a captured cgroup and in one that is not.

    CPU time holds the softirq work between the two ends only where the kernel
    charges it to the task (no CONFIG_IRQ_TIME_ACCOUNTING); elapsed time always
    does, and whatever else ran on that CPU.
    """
    if shutil.which("gcc") is None:
        raise click.ClickException("bench/cycle.c needs a compiler; install gcc and libc6-dev")
    with (
        tempfile.TemporaryDirectory() as folder,
        cgroup(f"peercredd-bench-{os.getpid()}-bare") as bare,
    ):
        program = Path(folder) / "cycle"
        subprocess.run(["gcc", "-O2", "-o", program, SOURCE], check=True)
        rows = tuple(
            _row(name, program, arguments, effort, bare, daemon.cgroup)
            for name, arguments in CYCLES.items()
        )
    columns = ("bare, CPU", "captured, CPU", "bare, elapsed", "captured, elapsed")
    return [Section("One connect + accept + close + close", columns, rows)]


def _row(
    name: str,
    program: Path,
    arguments: tuple[str, str],
    effort: Effort,
    bare: Path,
    captured: Path,
) -> Row:
    output = subprocess.run(
        [
            *(program, *arguments, str(effort.capture_cycles), str(effort.capture_rounds)),
            *(bare, captured),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    rounds = [tuple(map(float, line.split())) for line in output.splitlines()]
    bare_cpu, bare_elapsed, captured_cpu, captured_elapsed = (
        statistics.median(column) / 1e9 for column in zip(*rounds, strict=True)
    )
    # Of each pair, not of the medians: what else the host does changes over the
    # rounds and touches both halves of a pair alike.
    ratio = statistics.median(pair[2] / pair[0] for pair in rounds)
    values = (bare_cpu, captured_cpu, bare_elapsed, captured_elapsed)
    return Row(name, values, Unit.SECONDS, Verdict(ratio, target=TARGET))
