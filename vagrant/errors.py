"""What the lab cannot do."""

from __future__ import annotations

from pathlib import Path

TAIL_LINES = 15


class LabError(Exception):
    """One line: what is wrong; what mends it.

    `log` is what a program or a virtual machine said last; it is shown above that line.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class MachineError(LabError):
    """A machine did not boot, ended, or hung; that says nothing yet of the tests in it."""


def tail(log: Path) -> str:
    """The last lines of a log file, or nothing if there is none."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="backslashreplace").splitlines()[-TAIL_LINES:])
