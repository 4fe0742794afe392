"""Children: work the daemon's process must not carry the memory of, or not do as root."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any


class ChildError(Exception):
    """A child did not do its work. One line: which one, and what it said."""


@asynccontextmanager
async def start(
    module: str, arguments: Mapping[str, Any], descriptors: Sequence[int] = ()
) -> AsyncIterator[Process]:
    """Run ``python -m MODULE JSON PID``; leaving kills it if it still runs.

    PID is this process's: a child that asked for PR_SET_PDEATHSIG too late sees that it
    has another parent by then. One that is given `descriptors` speaks through them, and
    writes to the daemon's own log; of any other `result` takes what it writes.

    Raises:
        ChildError: it cannot be started.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # a root process imports nothing from the current directory
            "-m",
            module,
            json.dumps(arguments),
            str(os.getpid()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if descriptors else subprocess.PIPE,
            stderr=None if descriptors else subprocess.PIPE,
            pass_fds=descriptors,
            # Ctrl-C on a terminal is for the daemon to handle; and who has the terminal of its
            # session may type into it (TIOCSTI).
            start_new_session=True,
        )
    except OSError as error:
        raise ChildError(
            f"{module} cannot be started: {error.strerror}; see the daemon's limits of "
            "descriptors, tasks and memory"
        ) from error
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def result(child: Process, name: str, timeout_seconds: float) -> str:
    """Wait for the end of a child and return what it wrote to stdout.

    Raises:
        ChildError: it failed, died by a signal or took too long.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            output, errors = await child.communicate()
    except TimeoutError:
        raise ChildError(f"the {name} did not finish in {timeout_seconds:g} s") from None
    status = child.returncode
    if status == 0:
        return output.decode()
    if status is not None and status < 0:
        raise ChildError(f"the {name} died: {signal.strsignal(-status)} (signal {-status})")
    said = errors.decode(errors="backslashreplace").strip().splitlines()
    raise ChildError(f"the {name} failed: {said[-1] if said else f'exit status {status}'}")
