"""The life of the server's process: open, bind, give up privileges, serve, stop.

Its supervisor says by a line when the capture is there. The server says by one that it
serves, or why it cannot; from then on each line of the supervisor, a JSON list of what is
wrong, is answered with one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

import structlog

import peercredd
from peercredd import defaults, lean, logs, privileges
from peercredd.access import Policy
from peercredd.events import Events
from peercredd.figures import Figures
from peercredd.listen import ListenError
from peercredd.questions import Supervisor
from peercredd.service import PeerCredentialsService
from peercredd.store import Store

if TYPE_CHECKING:
    from peercredd.server import LoopbackTcp

SERVE: Final = b"serve\n"
SERVING: Final = b"serving\n"
ALIVE: Final = b"alive\n"
FAILED: Final = b"failed: "

log = structlog.get_logger()


class Settings(TypedDict):
    """What the supervisor tells a server at its start."""

    pin_dir: str
    path: str
    """To bind."""
    user: str
    uid: int
    gid: int
    pulse: int
    """Descriptor of a socket: see above."""
    questions: int
    """Descriptor of a socket for `questions.Supervisor`."""
    level: str
    format: Literal["auto", "text", "json"]
    tcp_port: int | None
    """Of loopback; None where nothing is served there."""
    metrics: str
    """Address and port to serve them at; empty for nowhere."""
    policy: dict[str, Any]
    """The fields of `access.Policy`, as JSON has them."""


def main(arguments: str, parent: int) -> int:
    """Serve until SIGTERM, or until the supervisor is gone; returns the exit status."""
    settings: Settings = json.loads(arguments)
    logs.configure(settings["level"], settings["format"])
    # Ctrl-C on a terminal is for the daemon to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pulse = socket.socket(fileno=settings["pulse"])
    try:
        if not privileges.die_with(parent):
            return 1
        privileges.forgo()
        # gRPC takes 0.3 s to import: the loader compiles meanwhile.
        from peercredd import server  # noqa: F401

        if pulse.recv(len(SERVE)) == SERVE:
            asyncio.run(_Life(settings, pulse, parent).serve())
    except (OSError, RuntimeError, ValueError, ListenError, privileges.PrivilegeError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error)
        with contextlib.suppress(OSError):
            pulse.sendall(FAILED + reason.replace("\n", " ").encode() + b"\n")
        return 1
    return 0


class _Life:
    def __init__(self, settings: Settings, pulse: socket.socket, parent: int) -> None:
        self._settings = settings
        self._pulse = pulse
        self._parent = parent
        self._supervisor = Supervisor(socket.socket(fileno=settings["questions"]))
        self._told: list[str] = []
        self._told_time = time.monotonic()
        self._store = Store(Path(settings["pin_dir"]), self._supervisor.so_peercred, self._troubles)
        self._events = Events(Path(settings["pin_dir"]))
        # Out of files, and later no descriptor may be left.
        log.debug("server started", version=peercredd.__version__)
        # Before there is a second thread, gRPC's or another.
        self._keep_bpf = not privileges.works_without(self._reads_maps)

    async def serve(self) -> None:
        from peercredd import server, watching

        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        reader, writer = await asyncio.open_unix_connection(sock=self._pulse)
        figures = Figures()
        service = functools.partial(
            PeerCredentialsService,
            processes=self._supervisor,
            daemon_pid=self._parent,
            figures=figures,
        )
        with contextlib.closing(self._store), self._events, self._metrics(figures):
            async with server.serving(
                self._store,
                watching.Hub(self._store, self._events),
                self._settings["path"],
                tcp=self._tcp(),
                service=service,
                bound=self._become,
            ):
                # Who scrapes has a thread of Python's, which may import what it has not yet.
                if not self._settings["metrics"]:
                    lean.give_back_code()
                writer.write(SERVING)
                beating = asyncio.create_task(self._beat(reader, writer, stop))
                await stop.wait()
                beating.cancel()

    def _tcp(self) -> LoopbackTcp | None:
        from peercredd.server import LoopbackTcp

        port, policy = self._settings["tcp_port"], self._settings["policy"]
        if port is None:
            return None
        # JSON has no numbers for keys.
        users, groups = (
            {int(number): why for number, why in policy[which].items()}
            for which in ("users", "groups")
        )
        return LoopbackTcp(
            self._store, port, Policy(users, groups, listener_details=policy["listener_details"])
        )

    @contextlib.contextmanager
    def _metrics(self, figures: Figures) -> Iterator[None]:
        if not self._settings["metrics"]:
            yield
            return
        lean.let_in("ssl")
        from peercredd import metrics

        host, _, port = self._settings["metrics"].rpartition(":")
        measured = metrics.Measured(self._store, figures)
        with metrics.serving(host.strip("[]"), int(port), measured):
            yield

    def _become(self) -> None:
        settings = self._settings
        user = privileges.User(settings["user"], settings["uid"], settings["gid"])
        privileges.become(user, keep_bpf=self._keep_bpf)
        if not privileges.die_with(self._parent):
            raise privileges.PrivilegeError("the supervisor has ended")
        if why_not := privileges.filter_system_calls():
            log.warning(
                "the server runs without a filter of system calls", user=user.name, reason=why_not
            )
        if self._keep_bpf:
            log.info("this kernel wants CAP_BPF for map reads, so the server keeps it")

    async def _beat(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: asyncio.Event
    ) -> None:
        before: list[str] = []
        while line := await reader.readline():
            self._told, self._told_time = json.loads(line), time.monotonic()
            now = self._store.problems()
            for problem in now:
                if problem not in before:
                    log.error(f"not serving: {problem}")
            if before and not now:
                log.info("serving again")
            before = now
            lean.give_back_freed_memory()
            writer.write(ALIVE)
        stop.set()

    def _reads_maps(self) -> None:
        self._store.find_by_socket(0)
        self._store.is_attached()

    def _troubles(self) -> Iterator[str]:
        yield from self._told
        if time.monotonic() - self._told_time > defaults.PULSE_TIMEOUT_SECONDS:
            yield "the supervisor is silent; see the log, or restart peercredd"
        try:
            os.close(os.dup(self._settings["questions"]))
        except OSError as error:
            if error.errno == errno.EMFILE:
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                yield (
                    f"the server may have no more than {limit} files open; raise LimitNOFILE= of "
                    "the service, or end clients"
                )
