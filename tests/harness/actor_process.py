"""The process that an `Actor` stands for: takes steps over a socket and runs them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn

from harness.channel import Descriptor, receive, send
from harness.syscalls import fork_with_pid, syscall

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]);"
    "from harness.actor_process import main; main(int(sys.argv[2]))"
)

_control: socket.socket


def command(executable: str, folder: Path, control: int) -> list[str]:
    """Arguments of a new process that takes its steps from the descriptor `control`.

    `folder` is where this package is.
    """
    return [executable, "-I", "-S", "-c", _BOOT, str(folder), str(control)]


def main(control: int) -> NoReturn:
    """Say that the program runs, then take steps."""
    # Once, and not in each process that is forked from this one.
    from harness import steps  # noqa: F401

    sock = socket.socket(fileno=control)
    sock.set_inheritable(False)
    send(sock, (True, None))
    serve(sock)


def serve(control: socket.socket) -> NoReturn:
    """Run the steps that come over `control`, until its other end is gone."""
    global _control
    _control = control
    while True:
        try:
            step, arguments, named = receive(control)
        except (EOFError, ConnectionResetError):
            os._exit(0)
        try:
            answer = (True, step(*arguments, **named))
        except Exception as error:
            answer = (False, error)
        send(control, answer)


def fork(control: Descriptor, wanted: int = 0) -> None:
    """Fork a process that says its pidfd over `control` and takes its steps from there.

    A pid would be a number of this process's own pid namespace. `wanted` is one, for the child.
    """
    if fork_with_pid(wanted) if wanted else os.fork():
        os.close(control)
        return
    _control.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sock = socket.socket(fileno=control)
    pidfd = os.pidfd_open(os.getpid())
    send(sock, Descriptor(pidfd))
    os.close(pidfd)
    serve(sock)


def execute(executable: str | None, kept: tuple[int, ...]) -> NoReturn:
    """Become a new program, with the descriptors `kept`, and go on taking steps."""
    program = executable or sys.executable
    for fd in (_control.fileno(), *kept):
        os.set_inheritable(fd, True)
    folder = Path(__file__).parent.parent
    os.execv(program, command(program, folder, _control.fileno()))


def go_on_in_second_thread() -> None:
    """Take the steps to come in another thread; the first one, which has the pid, ends."""
    thread = threading.Thread(target=serve, args=(_control,))
    thread.start()
    send(_control, (True, None))
    syscall("exit", 0)


def reap_no_children() -> None:
    """Let the kernel reap this process's children."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
