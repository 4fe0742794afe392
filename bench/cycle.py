"""bench/cycle.c: what one connection costs."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import click

SOURCE = Path(__file__).with_name("cycle.c")
WARM_UP_CYCLES = 200


class Cost(NamedTuple):
    """Of one connection, from its socket() to its second close()."""

    cpu_seconds: float
    """Of the task that does all of it."""
    elapsed_seconds: float
    connections: int
    """That were made to find out."""


@contextmanager
def compiled(source: Path = SOURCE) -> Iterator[Path]:
    """A program in C, until it is not needed any more."""
    if shutil.which("gcc") is None:
        raise click.ClickException(f"{source} needs a compiler; install gcc and libc6-dev")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / source.stem
        subprocess.run(["gcc", "-O2", "-o", program, source], check=True)
        yield program


class Cycle:
    """One task that makes connections of one kind, as a context manager.

    CPU time holds the softirq work between the two ends only where the kernel charges it
    to the task (no CONFIG_IRQ_TIME_ACCOUNTING); elapsed time always does, and whatever
    else ran on that CPU.
    """

    def __init__(
        self,
        program: Path,
        family: str,
        closing: str,
        cycles: int,
        warm_up_cycles: int = WARM_UP_CYCLES,
    ) -> None:
        self._process = subprocess.Popen(
            [program, family, closing, str(cycles), str(warm_up_cycles)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the benchmark, which ends its children in their order.
            process_group=0,
        )

    def cost(self, cgroup: Path) -> Cost:
        """Measure for the sockets of that cgroup."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(cgroup, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException("bench/cycle.c failed; its own message is above")
        cpu_ns, elapsed_ns, connections = map(int, line.split())
        return Cost(cpu_ns / 1e9, elapsed_ns / 1e9, connections)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.__exit__(kind, error, traceback)
