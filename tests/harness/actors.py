"""Processes that do what a test tells them, one step at a time."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar, cast

from harness import actor_process, steps
from harness.cgroup import Cgroup
from harness.channel import Descriptor, receive, send
from harness.patience import patient

WAIT_SECONDS = patient(30)

P = ParamSpec("P")
R = TypeVar("R")

PYTHON: str = getattr(sys, "_base_executable", sys.executable)
"""Not the virtual environment's, which other users may not be allowed to run."""


class Call(Generic[R]):
    """A step that an actor has begun."""

    def __init__(self, actor: Actor, step: str) -> None:
        self._actor = actor
        self._step = step

    def result(self, seconds: float = WAIT_SECONDS) -> R:
        """Wait for the step to end; raises what it raised."""
        self._actor.control.settimeout(seconds)
        try:
            done, value = receive(self._actor.control)
        except TimeoutError as error:
            message = f"pid {self._actor.pid} is still in {self._step} after {seconds} s"
            raise TimeoutError(message) from error
        if not done:
            raise value
        return cast(R, value)


class Actor:
    """One process. Calling it with a step and its arguments runs the step there."""

    pid: int
    """As this process knows it, whatever pid namespace the actor is in."""

    def __init__(self, control: socket.socket, pidfd: int) -> None:
        self.control = control
        self.pid = _pid(pidfd)
        self._pidfd = pidfd

    def __call__(self, step: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """Run a step and return what it returns; raises what it raises."""
        return self.start(step, *arguments, **named).result()

    def start(self, step: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> Call[R]:
        """Let a step begin, for one that waits for another actor's."""
        send(self.control, (step, arguments, named))
        return Call(self, getattr(step, "__name__", repr(step)))

    def fork(self, pid: int = 0) -> Actor:
        """fork(): a child with the same open sockets, under the same numbers.

        With `pid`, a free one, that is the child's number.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self(actor_process.fork, Descriptor(theirs.fileno()), pid)
        return Actor(ours, int(receive(ours)))

    def execute(self, kept: Iterable[int] = (), program: Path | None = None) -> None:
        """execve() of Python, or of `program`, a copy of it; the sockets `kept` stay open."""
        executable = str(program) if program else None
        self.start(actor_process.execute, executable, tuple(kept)).result()

    def give(self, fds: Iterable[int], to: Actor) -> list[int]:
        """Send sockets over with SCM_RIGHTS; returns their numbers there."""
        copies = self(steps.give, tuple(fds))
        try:
            return to(steps.take, copies)
        finally:
            for copy in copies:
                os.close(copy)

    def borrow(self, fd: int) -> socket.socket:
        """The actor's socket, for this process to ask: close it, or it never retires."""
        return socket.socket(fileno=int(self(steps.give, (fd,))[0]))

    def exit(self) -> None:
        """Let the process end, and wait until all it had open is closed."""
        self.control.close()
        self._wait()

    def kill(self) -> None:
        """SIGKILL, whatever it is doing, and wait likewise."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        else:
            self._wait()
        self.control.close()

    def close(self) -> None:
        """End the process, if it still runs, and forget it."""
        if self._pidfd < 0:
            return
        self.kill()
        os.close(self._pidfd)
        self._pidfd = -1

    def _wait(self) -> None:
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        if not ended.poll(WAIT_SECONDS * 1000):
            raise TimeoutError(f"pid {self.pid} did not end in {WAIT_SECONDS} s")


def _pid(pidfd: int) -> int:
    """The process behind a pidfd: its "Pid" of proc_pid_fdinfo(5)."""
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return next(int(value) for name, value in map(str.split, lines) if name == "Pid:")


class Origin:
    """The process all actors are forked from: small, without threads, in a cgroup.

    Without one it stays where the tests are.
    """

    def __init__(self, cgroup: Cgroup | None) -> None:
        # A copy that every user may read: the project may lie in a private home.
        self._folder = Path(tempfile.mkdtemp(prefix="peercredd-test-"))
        package = Path(__file__).parent
        shutil.copytree(
            package, self._folder / package.name, ignore=shutil.ignore_patterns("__pycache__")
        )
        self._folder.chmod(0o755)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = actor_process.command(PYTHON, self._folder, theirs.fileno())
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        if cgroup:
            cgroup.add(self._process.pid)
        self._actor = Actor(ours, os.pidfd_open(self._process.pid))
        Call[None](self._actor, "starting").result()
        self._actor(actor_process.reap_no_children)

    def actor(self) -> Actor:
        """A new process, root for now."""
        return self._actor.fork()

    def close(self) -> None:
        """End the origin; actors are ended by whoever asked for them."""
        self._actor.close()
        self._process.wait()
        shutil.rmtree(self._folder)

    def __enter__(self) -> Origin:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
