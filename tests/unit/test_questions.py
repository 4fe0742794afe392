"""What the server asks its supervisor, and what each makes of a partner gone wrong."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from peercredd import questions
from peercredd.processes import NamespaceUnknown, Processes, SupervisorSilent
from peercredd.questions import Supervisor, answer_questions
from peercredd.so_peercred import Row

ROWS = [Row("all", "config", "/sys/fs/cgroup", True, False, "")]


@contextmanager
def answered(so_peercred: Callable[[], list[Row]] = lambda: ROWS) -> Iterator[socket.socket]:
    """The asking end, while somebody answers at the other one."""
    asking, answering = socket.socketpair()
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(
            lambda: asyncio.run(answer_questions(answering, Processes(), so_peercred))
        )
        with asking:
            yield asking
        ended.result()


def test_the_answers_are_those_of_who_may_look() -> None:
    own = {kind: Path(f"/proc/self/ns/{kind}").stat().st_ino for kind in ("pid", "user")}
    processes = Processes()
    with answered() as channel:
        supervisor = Supervisor(channel)

        assert supervisor.so_peercred() == ROWS
        assert supervisor.maps_of_user_namespace(own["user"]) == processes.maps_of_user_namespace(
            own["user"]
        )
        assert supervisor.start_of_process(os.getpid()) == processes.start_of_process(os.getpid())
        assert supervisor.start_of_process(2**22 + 1) is None
        for ask in (supervisor.start_of_pid_namespace, supervisor.maps_of_user_namespace):
            with pytest.raises(NamespaceUnknown):
                ask(3)


def test_no_answer_is_no_answer_and_a_late_one_is_nobodys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(questions, "_TIMEOUT_SECONDS", 0.05)
    asking, answering = socket.socketpair()
    with asking, answering:
        supervisor = Supervisor(asking)
        with pytest.raises(SupervisorSilent):
            supervisor.start_of_process(1)
        monkeypatch.setattr(questions, "_TIMEOUT_SECONDS", 60.0)
        answering.sendall(b"[1, 111]\n[2, 222]\n")

        assert supervisor.start_of_process(1) == 222


def test_what_cannot_be_looked_at_stays_unanswered_and_the_next_question_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]

    def so_peercred() -> list[Row]:
        if failures:
            raise failures.pop()
        return ROWS

    monkeypatch.setattr(questions, "_TIMEOUT_SECONDS", 1.0)
    with capture_logs() as logs, answered(so_peercred) as channel:
        supervisor = Supervisor(channel)
        with pytest.raises(SupervisorSilent):
            supervisor.so_peercred()
        assert supervisor.so_peercred() == ROWS
    assert [entry["reason"] for entry in logs] == ["Too many open files"]


@pytest.mark.parametrize("said", [b"", b"nonsense\n", b"[1]\n", b"1\n"])
def test_a_supervisor_gone_wrong_is_as_good_as_none(said: bytes) -> None:
    asking, answering = socket.socketpair()
    with asking, answering:
        answering.sendall(said)
        answering.shutdown(socket.SHUT_WR)
        with pytest.raises(SupervisorSilent):
            Supervisor(asking).so_peercred()


@pytest.mark.parametrize(
    "said",
    [
        b"nonsense",
        b"[1, 2]",
        b'[1, "so_peercred", "x"]',
        b'[1, "open", 2]',
        b'{"a": 1}',
        b'{"a": 1, "b": 2, "c": 3}',
        b"5",
        b"null",
        b"\xff",
        b"[" * 200,
        b"x" * 300_000,
    ],
)
def test_a_server_that_asks_nonsense_gets_no_more_answers(said: bytes) -> None:
    with capture_logs() as logs, answered() as channel:
        threading.Thread(target=quietly, args=(channel, said + b"\n"), daemon=True).start()
        with suppress(ConnectionResetError):
            assert channel.recv(1) == b""
    assert [entry["log_level"] for entry in logs] == ["error"]


def quietly(channel: socket.socket, data: bytes) -> None:
    try:
        channel.sendall(data)
    except OSError:
        return


def test_a_number_as_large_as_any_is_unknown() -> None:
    with answered() as channel:
        channel.sendall(json.dumps([1, "pid_namespace", 2**100]).encode() + b"\n")
        assert channel.recv(64) == b"[1, null]\n"
