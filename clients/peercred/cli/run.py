"""``peercred run``: a command for which SO_PEERCRED works on TCP, to try it out."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click

from peercred import PeerCredError
from peercred.cli.display import escape
from peercred.cli.settings import common_options

# As env(1) and timeout(1) have them.
OWN_FAILURE, CANNOT_BE_RUN, NOT_FOUND = 125, 126, 127

# Ctrl-C and the like reach the command by themselves, as it is in the same process group:
# only what a process has sent to this one alone is sent on.
SENT_ON = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
}


class RunError(PeerCredError):
    """The command was not run, or not to its end, with SO_PEERCRED on TCP."""


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  sudo peercred run -- python3 server.py
  sudo peercred run -- sudo -u alice ./server --port 8080""",
)
@click.option(
    "--config",
    metavar="PATH",
    help="The daemon's configuration file, if it runs with another than its default.",
)
@click.argument("command", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
@common_options
@click.pass_context
def run(context: click.Context, config: str | None, command: tuple[str, ...]) -> None:
    """Run COMMAND with SO_PEERCRED on TCP answered by the kernel, to try it out.

    COMMAND gets a cgroup of its own, below the one you are in, from its first
    instruction on. getsockopt(SO_PEERCRED) names the peer of the TCP sockets that
    it creates there, in any language and with no library. Needs root, and a capture
    that covers your cgroup.

    When COMMAND ends, what it has left running is killed, and the cgroup is removed.

    Exit code: that of COMMAND, or 128 + N if signal N ended it; 125 when it could not
    be set up, 126 when COMMAND cannot be run, 127 when there is no such command.
    """
    if os.geteuid():
        raise RunError("only root can make a cgroup and attach to it; run it with sudo")
    # Who started this may have ignored it: then no child could be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Until all is cleared away no signal ends this process.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SENT_ON | {signal.SIGCHLD})
    with _cgroup(config) as cgroup:
        status = _run(command, cgroup, before)
    context.exit(status)


@contextmanager
def _cgroup(config: str | None) -> Iterator[Path]:
    """A cgroup below our own with SO_PEERCRED on TCP; it goes with all that is in it."""
    cgroup = _own_cgroup() / f"peercred-run-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        raise RunError(
            f"{cgroup} cannot be made: {error.strerror}; run it where cgroup v2 is writable"
        ) from error
    with _done_at_the_end(lambda: _clear_away(cgroup, config)):
        enabled = _peercredd(config, "enable", cgroup)
        if enabled.returncode:
            said = (enabled.stderr.strip().splitlines() or [f"exit code {enabled.returncode}"])[-1]
            if "No module named" in said:
                said = "the daemon is not installed with this command; see docs/operations.md"
            raise RunError(said.removeprefix("peercredd: "))
        yield cgroup


@contextmanager
def _done_at_the_end(work: Callable[[], None]) -> Iterator[None]:
    """Have work done when the block ends, or this process, be it by SIGKILL."""
    reader, writer = os.pipe()
    guard = os.fork()
    if not guard:
        code = OWN_FAILURE
        try:
            os.setsid()
            os.close(writer)
            os.read(reader, 1)  # which nobody writes: it ends when the other end is closed
            code = _try(work)
        finally:
            os._exit(code)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        if os.WIFSIGNALED(os.waitpid(guard, 0)[1]):
            _try(work)


def _try(work: Callable[[], None]) -> int:
    """Exit code of work whose failure is told."""
    try:
        work()
    except OSError as error:
        print(f"peercred: {error.filename} is left: {error.strerror}", file=sys.stderr)
        return OWN_FAILURE
    return 0


def _clear_away(cgroup: Path, config: str | None) -> None:
    if not cgroup.exists():  # the command has left and removed it
        return
    (cgroup / "cgroup.kill").write_text("1")
    with open(cgroup / "cgroup.events", "rb", buffering=0) as events:
        changes = select.poll()
        changes.register(events, select.POLLPRI)
        while b"populated 1" in os.pread(events.fileno(), 4096, 0):
            changes.poll()
    # Where it fails the capture has ended, and this with it.
    _peercredd(config, "disable", cgroup)
    for folder, _, _ in os.walk(cgroup, topdown=False):
        os.rmdir(folder)  # noqa: PTH106 - os.walk() gives no Path


def _own_cgroup() -> Path:
    try:
        # proc_pid_mountinfo(5); the oldest mount is the one that everybody means.
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        root = next(line.split()[4] for line in mounts if " - cgroup2 " in line)
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        raise RunError("no cgroup v2 is mounted; `peercredd check` says how to mount it") from None
    return Path(root, own.lstrip("/"))


def _peercredd(config: str | None, action: str, cgroup: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            # -P: root must not import what lies in the current directory.
            *(sys.executable, "-P", "-m", "peercredd"),
            *(("--config", config) if config else ()),
            *("so-peercred", action, "--transient", cgroup),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        check=False,
    )


def _run(command: tuple[str, ...], cgroup: Path, mask: set[int | signal.Signals]) -> int:
    child = os.fork()
    if not child:
        _become(command, cgroup, mask)
    while True:
        received = signal.sigwaitinfo(SENT_ON | {signal.SIGCHLD})
        if received.si_signo != signal.SIGCHLD:
            if received.si_code <= 0:  # by a process, not by the terminal
                os.kill(child, received.si_signo)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _become(command: tuple[str, ...], cgroup: Path, mask: set[int | signal.Signals]) -> NoReturn:
    """Be the command: what is its own begins with its first instruction."""
    code = OWN_FAILURE
    try:
        (cgroup / "cgroup.procs").write_text("0")
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = CANNOT_BE_RUN
        os.execvp(command[0], command)
    except FileNotFoundError:
        code = NOT_FOUND
        print(f"peercred: '{escape(command[0])}': no such command", file=sys.stderr)
    except ValueError:
        print("peercred: an empty name is no command", file=sys.stderr)
    except OSError as error:
        print(f"peercred: '{escape(command[0])}' cannot be run: {error.strerror}", file=sys.stderr)
    finally:
        os._exit(code)
