"""Entries of the systemd journal with fields of their own, by its native protocol.

The protocol is described at https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: one datagram an
entry, to a socket that is where the journal is.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from typing import Final

SOCKET: Final = "/run/systemd/journal/socket"

PREFIX: Final = "PEERCREDD_"
"""Of the fields that are not the journal's own, systemd.journal-fields(7)."""

_NOT_IN_A_NAME: Final = re.compile(r"[^A-Z0-9_]")


def is_stderr() -> bool:
    """Whether stderr is still what systemd connected, see JOURNAL_STREAM in systemd.exec(5)."""
    stderr = os.fstat(sys.stderr.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


class Journal:
    """A connection to the journal."""

    def __init__(self, path: str = SOCKET) -> None:
        """Connect.

        Raises:
            OSError: no journal takes entries there.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def send(self, message: str, priority: int, fields: Mapping[str, object]) -> None:
        """Write an entry; `priority` is a level of syslog(3), `fields` get the PREFIX.

        Raises:
            OSError: it was not taken: the journal is gone, or the entry too long.
        """
        entry = {
            "MESSAGE": message,
            "PRIORITY": priority,
            "SYSLOG_IDENTIFIER": "peercredd",
            **{PREFIX + _NOT_IN_A_NAME.sub("_", name.upper()): fields[name] for name in fields},
        }
        self._socket.send(b"".join(_field(name, str(entry[name])) for name in entry))


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")
    if b"\n" in data:
        return b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data)
    return b"%s=%s\n" % (name.encode(), data)
