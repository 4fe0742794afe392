"""Other programs, run while waiting for several machines at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from vagrant.errors import LabError, tail

DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
"""What is started so ends with the lab, also when that is killed."""


async def run(*command: str | Path, log: Path, echo: bool = False) -> int:
    """Run a program, append what it says to `log`, and return its exit status.

    Whoever is cancelled while waiting ends the program.

    Args:
        command: The program and its arguments.
        log: Takes its stdout and its stderr.
        echo: Whether they are shown on stdout as well.
    """
    # In a group of its own: Ctrl-C on a terminal is for the lab to handle.
    process = await asyncio.create_subprocess_exec(
        *DIES_WITH_US,
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    assert process.stdout
    try:
        with log.open("ab") as file:
            while said := await process.stdout.read(1 << 16):
                file.write(said)
                file.flush()
                if echo:
                    sys.stdout.buffer.write(said)
                    sys.stdout.flush()
        return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def must(*command: str | Path, log: Path, failing: str) -> None:
    """Run a program that has to succeed; raises LabError, saying `failing`, if it does not."""
    if status := await run(*command, log=log):
        raise LabError(f"{failing} (exit status {status}); all it said is in {log}", tail(log))
