"""Keeps a server running: starts it, sees that it lives, and replaces it when it does not.

The server is the part that strangers talk to. What it may not do any more is done here, by
a process that talks to nobody else: see `questions`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import socket
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import AsyncExitStack, closing, suppress
from types import TracebackType
from typing import Self

import structlog

from peercredd import children, defaults, privileges
from peercredd.access import Policy
from peercredd.config import Config
from peercredd.listen import UnixSocket
from peercredd.notify import Notifier
from peercredd.processes import Processes
from peercredd.questions import answer_questions
from peercredd.so_peercred import Row

log = structlog.get_logger()


class ServerError(Exception):
    """The server does not serve. One line: why, and what mends it."""


class _Server:
    """One server's process; `resources` end it."""

    def __init__(
        self,
        process: Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        questions: socket.socket,
        resources: AsyncExitStack,
    ) -> None:
        self.process = process
        self.reader = reader
        self.writer = writer
        self.questions = questions
        self.resources = resources

    async def stop(self) -> None:
        """End it, with grace for the calls under way."""
        with suppress(ProcessLookupError):
            self.process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * defaults.STOP_GRACE_SECONDS + 1):
                await self.process.wait()
        await self.resources.aclose()

    async def end(self) -> str:
        """Wait for the end of a server that is silent, and say how it came."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self.process.wait()
        await self.resources.aclose()
        status = self.process.returncode or 0
        if status < 0:
            return f"{signal.strsignal(-status)} (signal {-status})"
        return f"exit status {status}"


class Supervisor:
    """A server that runs while the ``async with`` block does.

    It begins to import what it needs when the block does, and serves from `serve` on.
    Entering raises `children.ChildError` or `privileges.PrivilegeError`.
    """

    def __init__(
        self, config: Config, policy: Policy, unix_socket: UnixSocket, notifier: Notifier
    ) -> None:
        """Start nothing yet; `notifier` is told when the server has shown to be, or not to."""
        self._config = config
        self._policy = policy
        self._socket = unix_socket
        self._notifier = notifier
        self._user = privileges.user(config.api.user)
        self._processes = Processes()
        self._keeping: asyncio.Task[None] | None = None
        self._server: _Server | None = None
        self._so_peercred: Callable[[], list[Row]] = list
        self.problems: list[str] = []
        """What the server is to say it suffers from."""

    async def serve(self, so_peercred: Callable[[], list[Row]]) -> None:
        """Serve from now on; the capture is there, and `so_peercred` is `OptIn.rows`.

        Raises:
            ServerError: the server cannot. If it cannot later, it is tried again.
            ListenError: the socket cannot be put in its place.
        """
        assert self._server
        self._so_peercred = so_peercred
        await self._begin(self._server)
        self._keeping = asyncio.create_task(self._keep())

    @property
    def server_pid(self) -> int | None:
        """The server's process, while there is one."""
        return self._server.process.pid if self._server else None

    async def _start(self) -> _Server:
        config = self._config
        async with AsyncExitStack() as resources:
            pulse, their_pulse = socket.socketpair()
            questions, their_questions = socket.socketpair()
            resources.enter_context(closing(pulse))
            resources.enter_context(closing(questions))
            with closing(their_pulse), closing(their_questions):
                descriptors = their_pulse.fileno(), their_questions.fileno()
                process = await resources.enter_async_context(
                    children.start(
                        "peercredd.server_process",
                        {
                            "pin_dir": config.capture.pin_dir,
                            "path": self._socket.private_path,
                            "user": self._user.name,
                            "uid": self._user.uid,
                            "gid": self._user.gid,
                            "pulse": descriptors[0],
                            "questions": descriptors[1],
                            "level": config.log.level,
                            "format": config.log.format,
                            "tcp_port": config.api.tcp_port if config.api.tcp else None,
                            "metrics": config.metrics.address,
                            "policy": dataclasses.asdict(self._policy),
                        },
                        (*descriptors, self._socket.folder),
                    )
                )
            reader, writer = await asyncio.open_unix_connection(sock=pulse)
            return _Server(process, reader, writer, questions, resources.pop_all())
        raise AssertionError  # the block above returns or raises

    async def _begin(self, server: _Server) -> None:
        try:
            server.writer.write(b"serve\n")
            async with asyncio.timeout(defaults.SERVER_START_SECONDS):
                line = await server.reader.readline()
        except TimeoutError:
            raise ServerError(
                f"the server is not ready after {defaults.SERVER_START_SECONDS:g} s"
            ) from None
        except ConnectionError:
            line = b""
        if line != b"serving\n":
            said = line.decode(errors="backslashreplace").strip()
            raise ServerError(f"the server {said or f'ended: {await server.end()}'}")
        answering = asyncio.create_task(
            answer_questions(server.questions, self._processes, lambda: self._so_peercred())
        )
        server.resources.callback(answering.cancel)
        self._socket.publish()
        self._notifier.alive()

    async def _keep(self) -> None:
        deaths = 0
        while True:
            assert self._server
            began = time.monotonic()
            try:
                reason = await self._until_it_fails(self._server)
            except Exception as error:
                reason = str(error)
            if time.monotonic() - began > defaults.RESTART_FORGIVEN_SECONDS:
                deaths = 0
            while True:
                delay = defaults.RESTART_SECONDS[min(deaths, len(defaults.RESTART_SECONDS) - 1)]
                deaths += 1
                log.error(
                    "the server has ended and is started again; capture goes on",
                    reason=reason,
                    seconds=delay,
                )
                self._notifier.status(f"not serving, while capture goes on: {reason}")
                await asyncio.sleep(delay)
                try:
                    await self._replace()
                except Exception as error:
                    # The capture goes on, and the next attempt may work.
                    reason = str(error)
                else:
                    break
            log.info("serving again", server_pid=self.server_pid)
            self._notifier.status("serving")

    async def _replace(self) -> None:
        if self._server:
            await self._server.resources.aclose()
            self._server = None
        self._socket.renew()
        self._server = await self._start()
        await self._begin(self._server)

    async def _until_it_fails(self, server: _Server) -> str:
        ended = asyncio.create_task(server.process.wait())
        try:
            while True:
                server.writer.write(json.dumps(self.problems).encode() + b"\n")
                try:
                    async with asyncio.timeout(defaults.PULSE_TIMEOUT_SECONDS):
                        line = await server.reader.readline()
                except TimeoutError:
                    server.process.kill()
                    return f"silent for {defaults.PULSE_TIMEOUT_SECONDS:g} s, so it was killed"
                except ConnectionError:
                    line = b""
                if not line:
                    return await server.end()
                self._notifier.alive()
                await asyncio.wait({ended}, timeout=defaults.PULSE_SECONDS)
        finally:
            ended.cancel()

    async def __aenter__(self) -> Self:
        self._server = await self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._keeping:
            self._keeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeping
        if self._server:
            await self._server.stop()
