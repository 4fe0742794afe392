"""What the server asks its supervisor, as it may not see it itself: one question at a time.

Lines of JSON over a socket pair. Of what comes from the server nothing is believed: it may
have been taken over.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import structlog

from peercredd.processes import NamespaceUnknown, Processes, SupervisorSilent
from peercredd.so_peercred import Row

_TIMEOUT_SECONDS: Final = 2.0
"""An answer takes milliseconds; the server answers nobody else meanwhile."""

_LONGEST_QUESTION: Final = 256
"""Bytes."""

_Subject = Literal["pid_namespace", "user_namespace", "process", "so_peercred"]

log = structlog.get_logger()


class Supervisor:
    """The server's end: asks, and waits for the answer.

    It has the methods of `processes.Processes`; each method raises SupervisorSilent, too.
    """

    def __init__(self, channel: socket.socket) -> None:
        """Take over one end of a socket pair, the other of which `answer_questions` serves."""
        self._channel = channel
        self._received = b""
        self._number = 0

    def start_of_pid_namespace(self, namespace: int) -> int:
        """See `Processes`."""
        return int(self._known("pid_namespace", namespace))

    def maps_of_user_namespace(self, namespace: int) -> tuple[str, str]:
        """See `Processes`."""
        uids, gids = self._known("user_namespace", namespace)
        return uids, gids

    def start_of_process(self, pid: int) -> int | None:
        """See `Processes`."""
        start = self._ask("process", pid)
        return None if start is None else int(start)

    def so_peercred(self) -> list[Row]:
        """Where SO_PEERCRED on TCP is asked for, or attached: `so_peercred.OptIn.rows`."""
        return [Row(*row) for row in self._ask("so_peercred")]

    def _known(self, field: _Subject, namespace: int) -> Any:
        found = self._ask(field, namespace)
        if found is None:
            raise NamespaceUnknown(field, namespace)
        return found

    def _ask(self, subject: _Subject, number: int = 0) -> Any:
        self._number += 1
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        try:
            self._channel.settimeout(_TIMEOUT_SECONDS)
            self._channel.sendall(json.dumps([self._number, subject, number]).encode() + b"\n")
            while True:
                asked, answer = json.loads(self._line(deadline))
                # What comes too late belongs to a question that was given up.
                if asked == self._number:
                    return answer
        except (OSError, ValueError, TypeError) as error:
            raise SupervisorSilent from error

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._received:
            self._channel.settimeout(max(deadline - time.monotonic(), 0.001))
            if not (data := self._channel.recv(65536)):
                raise ConnectionResetError
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line


async def answer_questions(
    channel: socket.socket, processes: Processes, so_peercred: Callable[[], list[Row]]
) -> None:
    """Answer at the other end of a `Supervisor`, in root's name, until it is closed."""
    reader, writer = await asyncio.open_unix_connection(sock=channel, limit=_LONGEST_QUESTION)
    try:
        while line := await reader.readline():
            number, subject, about = _question(line)
            # A thread: to find a namespace, all of /proc may have to be read.
            try:
                answer = await asyncio.to_thread(_answer, processes, so_peercred, subject, about)
            except OSError as error:
                # Not known is not "no such namespace": the server gives up by itself.
                log.error("a question of the server stays unanswered", reason=error.strerror)
                continue
            writer.write(json.dumps([number, answer]).encode() + b"\n")
            await writer.drain()
    except (ValueError, ConnectionError) as error:
        log.error("the server asks what it never would; it gets no more answers", reason=str(error))
    finally:
        writer.close()


def _question(line: bytes) -> tuple[int, str, int]:
    asked = json.loads(line)
    # Not isinstance(): a bool is an int.
    if type(asked) is not list or [type(each) for each in asked] != [int, str, int]:
        raise ValueError("not a question")
    number, subject, about = asked
    return number, subject, about


def _answer(
    processes: Processes, so_peercred: Callable[[], list[Row]], subject: str, about: int
) -> object:
    try:
        match subject:
            case "pid_namespace":
                return processes.start_of_pid_namespace(about)
            case "user_namespace":
                return processes.maps_of_user_namespace(about)
            case "process":
                return processes.start_of_process(about)
            case "so_peercred":
                return so_peercred()
    except NamespaceUnknown:
        return None
    raise ValueError("not a question")
