"""The project in a machine: synced, installed as README says, tested, and its logs fetched."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import click

from vagrant import index, report
from vagrant.box import Box
from vagrant.errors import LabError, MachineError
from vagrant.kernels import Kernel
from vagrant.machine import Machine, running
from vagrant.programs import must, run
from vagrant.recipe import PROJECT
from vagrant.report import Outcome

FOLDER = "/root/peercredd"
CA_BUNDLE = "/etc/ssl/certs/of-the-host.pem"
PATIENCE = {"kvm": 1, "tcg": 5}
"""How much longer than on a machine of real CPUs the tests wait."""
JUNIT = "junit.xml"
AGAIN = "again"
"""The folder of the second machine's logs, where a first one was lost."""
TOO_OLD = "none: too old"
TESTS = ("tests/kernel", "tests/conformance")
BCC_VERSION = "/usr/bin/python3 -c 'import bcc; print(bcc.__version__)'"


class Guest:
    """A machine with the project in it."""

    def __init__(self, machine: Machine, logs: Path) -> None:
        self.machine = machine
        self.logs = logs
        self._environment: dict[str, str] = {}

    async def run(self, command: str, log: str, *, echo: bool = False) -> int:
        """Run a shell command in the project's folder; what it says goes to `log`."""
        return await run(*self._over_ssh(command), log=self.logs / log, echo=echo)

    async def ask(self, command: str) -> list[str]:
        """The lines that a shell command says; raises LabError if it fails."""
        log = self.logs / "asked.log"
        await must(*self._over_ssh(command), log=log, failing=f"in the machine, {command} failed")
        said = log.read_text().splitlines()
        log.unlink()
        return said

    async def fetch(self, file: str) -> Path:
        """Copy a file of the project's folder to the logs; raises LabError if it is not there."""
        fetched = self.logs / file
        command = self._over_ssh(f"cat {file}")
        await must(*command, log=fetched, failing=f"the machine has no {file}")
        return fetched

    def reach_what_the_host_reaches(self) -> Path | None:
        """Give commands its way to package indexes; returns the CA bundle for it, if any."""
        self._environment, bundle = index.settings()
        return bundle

    async def install(self) -> None:
        """Bring the tree here and install it as README tells everybody to."""
        log = self.logs / "install.log"
        bundle = self.reach_what_the_host_reaches()
        # Most of what is installed is never imported here.
        self._environment["PIP_NO_COMPILE"] = "1"
        if bundle:
            self._environment |= {"PIP_CERT": CA_BUNDLE, "SSL_CERT_FILE": CA_BUNDLE}
            await self.copy(log, str(bundle.resolve()), CA_BUNDLE)
        uv = Path(sys.executable).with_name("uv")
        if uv.exists():
            await self.copy(log, str(uv), "/usr/local/bin/")
        # Not git's list of files: git refuses a tree that is another user's.
        leave_out = ("--filter=:- .gitignore", "--exclude=/.git")
        await self.copy(log, *leave_out, f"{PROJECT}/", f"{FOLDER}/")
        await must(
            *self._over_ssh("./dev setup"),
            log=log,
            failing="./dev setup failed in the machine; see whether it reaches the package index",
        )

    def shell(self) -> list[str]:
        """The command for a terminal in the project's folder."""
        return [*self.machine.ssh("-t"), f"cd {FOLDER}; PATH={FOLDER}/.venv/bin:$PATH exec bash"]

    def _over_ssh(self, command: str) -> list[str]:
        settings = " ".join(shlex.quote(f"{k}={v}") for k, v in self._environment.items())
        in_folder = f"cd {FOLDER} && env {settings} sh -c {shlex.quote(command)}"
        return [*self.machine.ssh(), in_folder]

    async def copy(self, log: Path, *arguments: str) -> None:
        """Let rsync copy files here; its options and sources, and then the target here."""
        shell = shlex.join(self.machine.ssh()[:-1])
        source = [*arguments[:-1], f"root@127.0.0.1:{arguments[-1]}"]
        await must(
            *("rsync", "--archive", "--rsh", shell, *source),
            log=log,
            failing="files could not be copied into the machine",
        )


async def test(
    box: Box,
    accelerator: str,
    cpus: int,
    hook_sets: Sequence[str],
    arguments: Sequence[str],
    logs: Path,
    *,
    echo: bool,
) -> list[Outcome]:
    """Run the tests with each hook set, in one machine.

    A machine that hangs or ends is booted anew, once, and the outcomes say so. A test that
    fails is never run again.

    Args:
        box: The kernel, and what it is booted with.
        accelerator: What QEMU uses.
        cpus: How many the machine gets.
        hook_sets: What to test, of those that have to work there.
        arguments: More for pytest.
        logs: An existing folder that takes the results, the console, and all that is said.
        echo: Whether what is said is shown as well.
    """
    kernel = box.kernel
    names = (TOO_OLD,) if kernel.status == "too-old" else (*hook_sets, report.ANY)
    outcomes: dict[str, Outcome] = {}

    async def attempt(logs: Path) -> None:
        outcomes.update({name: Outcome(kernel.name, name) for name in names})
        async with running(box, accelerator, cpus, logs) as machine:
            guest = Guest(machine, logs)
            await _test_in(guest, kernel, outcomes, PATIENCE[accelerator], arguments, echo)

    lost: list[str] = []
    try:
        await with_a_second_machine(attempt, logs, lost)
    except LabError as error:
        for outcome in outcomes.values():
            outcome.problem = outcome.problem or str(error)
        if error.log:
            next(iter(outcomes.values())).remarks.append(error.log)
    for outcome in outcomes.values():
        outcome.remarks += lost
    return list(outcomes.values())


async def with_a_second_machine(
    attempt: Callable[[Path], Awaitable[None]], logs: Path, lost: list[str]
) -> None:
    """Do in a machine what `attempt` does; if the machine is lost, once more in another.

    Args:
        attempt: Takes a folder for logs.
        logs: An existing folder; the second machine's logs are in a folder of it.
        lost: Is told in a line of a machine that was lost.
    """
    try:
        await attempt(logs)
    except MachineError as error:
        lost.append(f"{error}; booted anew, once")
        click.echo(f"{error.log}\n{lost[0]}", err=True)
        (logs / AGAIN).mkdir()
        await attempt(logs / AGAIN)


async def _test_in(
    guest: Guest,
    kernel: Kernel,
    outcomes: dict[str, Outcome],
    patience: int,
    arguments: Sequence[str],
    echo: bool,
) -> None:
    click.echo(f"{kernel.name}: installing the project", err=True)
    await guest.install()
    (release,) = await guest.ask("uname -r")
    (bcc,) = await guest.ask(BCC_VERSION)
    for outcome in outcomes.values():
        outcome.running = f"{release}, BCC {bcc}"
        if not (release.startswith(kernel.release) and bcc.startswith(kernel.bcc)):
            outcome.remarks.append(
                f"kernels.json says {kernel.release}, BCC {kernel.bcc}: bring it up to date"
            )
    click.echo(f"{kernel.name}: testing", err=True)
    if TOO_OLD in outcomes:
        await _see_it_refused(guest, outcomes[TOO_OLD])
    else:
        await _run_pytest(guest, outcomes, patience, arguments, echo)
    await guest.run("dmesg", "dmesg.log")


async def _run_pytest(
    guest: Guest, outcomes: dict[str, Outcome], patience: int, arguments: Sequence[str], echo: bool
) -> None:
    words = ["./dev", "test", f"--junit-xml={JUNIT}"]
    words += [f"--hook-set={name}" for name in outcomes if name != report.ANY]
    words += arguments
    if not any(argument.startswith("tests/") for argument in arguments):
        words += TESTS
    settings = ["PYTHONUNBUFFERED=1", "PEERCREDD_REQUIRE_KERNEL=1", "PEERCREDD_OWN_MACHINE=1"]
    settings += [f"PEERCREDD_TIMEOUT_FACTOR={patience}"]
    if kills := os.environ.get("PEERCREDD_KILLS"):
        settings += [f"PEERCREDD_KILLS={kills}"]
    status = await guest.run(shlex.join(["env", *settings, *words]), "pytest.log", echo=echo)
    report.read(await guest.fetch(JUNIT), outcomes)
    if status and all(outcome.is_ok for outcome in outcomes.values()):
        raise LabError(f"pytest ended with {status}; see {guest.logs / 'pytest.log'}")


async def _see_it_refused(guest: Guest, outcome: Outcome) -> None:
    """The daemon has to end at once, with 1 and with one line that says which kernel would do."""
    log = "peercredd.log"
    status = await guest.run("timeout 300 .venv/bin/peercredd", log)
    said = (guest.logs / log).read_text().splitlines()
    if status == 1 and len(said) == 1 and re.search(r"Linux [\d.]+ or newer is needed", said[0]):
        outcome.passed = 1
        outcome.remarks.append(said[0])
    else:
        outcome.problem = (
            f"peercredd should end with 1 and one line that says why the kernel is too old; it "
            f"ended with {status} and {len(said)} lines, see {log}"
        )
