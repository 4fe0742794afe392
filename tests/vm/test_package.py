"""What the lab makes of the Debian package's life in a machine."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.lab import Lab
from vagrant import box, kernels, package, recipe
from vagrant.errors import LabError, MachineError

BARE = kernels.find("debian12").bare()
LOST = MachineError("debian12-bare hung", "watchdog: BUG: soft lockup")


def seen(
    machines: list[int | LabError], logs: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[bool, list[str]]:
    """What comes of machines that end life.sh so, or raise these, one after the other.

    Returns:
        Whether all was well, and the commands that were run in a machine.
    """
    commands: list[str] = []

    @asynccontextmanager
    async def running(*_: object) -> AsyncIterator[int]:
        machine = machines.pop(0)
        if isinstance(machine, LabError):
            raise machine
        yield machine

    class Guest:
        def __init__(self, status: int, logs: Path) -> None:
            self.status = status

        def reach_what_the_host_reaches(self) -> None:
            pass

        async def copy(self, log: Path, *arguments: str) -> None:
            pass

        async def run(self, command: str, log: str, *, echo: bool) -> int:
            commands.append(command)
            return self.status

    async def build(logs: Path, folder: Path) -> tuple[Path, Path]:
        return folder / "old.deb", folder / "new.deb"

    monkeypatch.setattr(package, "running", running)
    monkeypatch.setattr(package, "Guest", Guest)
    monkeypatch.setattr(package, "build", build)
    return asyncio.run(package.see(box.Box(BARE, logs), "tcg", 1, logs)), commands


@pytest.mark.parametrize(("status", "is_kept"), [(0, True), (1, False)])
def test_all_is_well_if_every_promise_was_seen_kept(
    status: int, is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seen([status], tmp_path, monkeypatch) == (is_kept, ["./life.sh ./old.deb ./new.deb"])


def test_a_machine_that_was_lost_is_booted_anew_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_kept, commands = seen([LOST, 0], tmp_path, monkeypatch)

    assert is_kept
    assert len(commands) == 1


def test_a_second_loss_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="debian12-bare hung"):
        seen([LOST, LOST, 0], tmp_path, monkeypatch)


def test_a_life_that_was_broken_off_is_no_broken_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LabError, match="ended with 255"):
        seen([255], tmp_path, monkeypatch)


def test_a_bare_machine_has_nothing_that_is_installed_for_the_project() -> None:
    bare = set(recipe.packages(BARE))
    listed = subprocess.check_output([recipe.PROJECT / "dev", "packages"], text=True).split()

    assert bare < set(recipe.packages(kernels.find("debian12")))
    assert bare & set(listed) == {"iproute2"}


def test_a_bare_box_is_no_other_kernels_box(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERCREDD_LAB", str(lab.folder))
    lab.box(b"")

    assert box.existing(kernels.find("debian12"))
    assert box.existing(BARE) is None
