"""The command ``peercred``, run as people run it."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from typing import IO


class Peercred:
    """Runs the command, in a process and an environment of its own."""

    def __init__(self, address: str) -> None:
        self.environment = os.environ | {"PEERCRED_ADDRESS": address, "TERM": "xterm-256color"}
        self.environment.pop("COLUMNS", None)

    def start(
        self, *arguments: str, output: int | IO[str] = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        # A machine under load is not what these tests are about.
        patience = ("--timeout", "60") if arguments else ()
        return subprocess.Popen(
            [sys.executable, "-m", "peercred.cli.main", *patience, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, *arguments: str, output: int | IO[str] = subprocess.PIPE
    ) -> subprocess.CompletedProcess[str]:
        return finish(self.start(*arguments, output=output))

    def on_terminal(self, *arguments: str, columns: int) -> str:
        """Return all that the terminal was sent."""
        outside, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        with self.start(*arguments, output=inside) as process:
            os.close(inside)
            shown = b""
            try:
                while part := os.read(outside, 65536):
                    shown += part
            except OSError:
                pass  # EIO: the other end is closed
            assert process.stderr
            assert process.stderr.read() == ""
        os.close(outside)
        return shown.decode()


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    with process:
        stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
