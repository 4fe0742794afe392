"""The Debian package, in a machine that has nothing it needs: its whole life, in minutes."""

from __future__ import annotations

import asyncio
import tempfile
import tomllib
from pathlib import Path

import click

from vagrant.box import Box
from vagrant.errors import LabError
from vagrant.machine import running
from vagrant.programs import must
from vagrant.recipe import PROJECT
from vagrant.suite import FOLDER, Guest, with_a_second_machine

LIFE = PROJECT / "tests" / "vm" / "deb"
"""What is done in the machine: `life.sh`, and what it needs."""


async def build(logs: Path, folder: Path) -> tuple[Path, Path]:
    """Build the package of this tree, and that of its next version, which differs in nothing else.

    Raises:
        LabError: it cannot be built.
    """
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    versions = (version, f"{version}+1")
    await asyncio.gather(*(_build(each, logs, folder / each) for each in versions))
    old, new = (deb for each in versions for deb in (folder / each).glob("*.deb"))
    return old, new


async def _build(version: str, logs: Path, folder: Path) -> None:
    await must(
        *(PROJECT / "dev", "deb", version, folder),
        log=logs / f"build-{version}.log",
        failing=f"the package {version} was not built",
    )


async def see(box: Box, accelerator: str, cpus: int, logs: Path) -> bool:
    """Install, upgrade, kill, and purge the package; tells on stdout what was seen.

    A machine that hangs or ends is booted anew, once.

    Args:
        box: A bare one, of the release that this machine has.
        accelerator: What QEMU uses.
        cpus: How many the machine gets.
        logs: An existing folder that takes the console, and all that is said.

    Returns:
        Whether every promise was seen to be kept.

    Raises:
        LabError: it could not be tried.
    """
    is_kept = False

    async def attempt(logs: Path) -> None:
        nonlocal is_kept
        async with running(box, accelerator, cpus, logs) as machine:
            guest = Guest(machine, logs)
            guest.reach_what_the_host_reaches()
            await guest.copy(logs / "copy.log", f"{LIFE}/", str(old), str(new), f"{FOLDER}/")
            command = f"./life.sh ./{old.name} ./{new.name}"
            status = await guest.run(command, "life.log", echo=True)
            if status not in (0, 1):
                # ssh has its own, for a machine that answers no more.
                raise LabError(f"{LIFE / 'life.sh'} ended with {status}; see {logs / 'life.log'}")
            is_kept = status == 0

    with tempfile.TemporaryDirectory(prefix="peercredd-deb-") as folder:
        click.echo(f"{box.kernel.name}: building the package, twice", err=True)
        old, new = await build(logs, Path(folder))
        click.echo(f"{box.kernel.name}: booting; logs in {logs}", err=True)
        await with_a_second_machine(attempt, logs, [])
    return is_kept
