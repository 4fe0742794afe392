"""A machine ends when its lab ends, and says why it does not boot."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from harness.lab import CRASHES, HANGS, QEMU, Lab, on_a_small_disk
from harness.patience import patient
from vagrant import machine
from vagrant.errors import LabError, MachineError

pytestmark = pytest.mark.usefixtures("needs_qemu")


def test_a_kernel_that_crashes_is_booted_once_more_and_said_to_have_ended(lab: Lab) -> None:
    lab.box(CRASHES)
    process = lab.start("vm-test", "debian12", PEERCREDD_VM_ACCELERATOR="tcg")

    table, _ = process.communicate()

    assert process.returncode == 1
    said = " ".join(table.split())
    assert "debian12 did not boot: QEMU has ended" in said
    assert "booted anew, once" in said


def test_a_kernel_that_hangs_is_not_waited_for_forever(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "BOOT_SECONDS", 1)

    async def boot() -> None:
        async with machine.running(lab.box(HANGS), "tcg", 1, tmp_path):
            raise AssertionError("it boots")

    with pytest.raises(LabError, match="did not boot within 1 s"):
        asyncio.run(boot())

    assert not qemus(os.getpid())
    assert not (tmp_path / "ssh-key").exists()


def test_what_the_cpus_of_a_machine_that_hangs_are_doing_is_written_down(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "BOOT_SECONDS", 1)
    monkeypatch.setattr(machine, "BETWEEN_SAMPLES_SECONDS", 0)

    async def boot() -> None:
        async with machine.running(lab.box(HANGS), "tcg", 2, tmp_path):
            raise AssertionError("it boots")

    with pytest.raises(MachineError):
        asyncio.run(boot())

    written = (tmp_path / machine.REGISTERS).read_text()
    assert [written.count(each) for each in ("CPU#0", "CPU#1", "IP=")] == [2, 2, 4]


def test_a_machine_that_answers_no_more_is_what_failed(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(_: object) -> None:
        pass

    monkeypatch.setattr(machine, "_until_ready", at_once)
    monkeypatch.setattr(machine, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(machine, "BETWEEN_SAMPLES_SECONDS", 0)

    async def fail() -> None:
        async with machine.running(lab.box(HANGS), "tcg", 1, tmp_path):
            raise LabError("the tree could not be copied into the machine")

    with pytest.raises(MachineError, match=r"debian12 hung: .* answer no more \d+ s after"):
        asyncio.run(fail())

    assert (tmp_path / machine.REGISTERS).exists()


@pytest.mark.parametrize(
    ("version", "is_warned_of"),
    [("7.2", True), ("8.0", True), ("8.1", False), ("10.0", False)],
)
def test_an_emulator_that_may_hang_machines_is_warned_of(
    version: str,
    is_warned_of: bool,
    lab: Lab,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    qemu = tmp_path / QEMU
    qemu.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version}.2 (Debian 1:{version})'\n")
    qemu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PEERCREDD_VM_ACCELERATOR", "tcg")

    asyncio.run(machine.accelerator(lab.box(HANGS)))

    assert capsys.readouterr().err.startswith(f"QEMU {version} may hang") == is_warned_of


def test_what_hangs_a_kernel_is_no_acceleration(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PEERCREDD_VM_ACCELERATOR", raising=False)
    monkeypatch.setattr(machine, "PROBE_SECONDS", 1)

    assert asyncio.run(machine.accelerator(lab.box(HANGS))) == "tcg"
    assert capsys.readouterr().err.startswith("KVM does not work here: emulating")


def test_an_accelerator_that_there_is_not_is_told_those_there_are(lab: Lab) -> None:
    lab.box(HANGS)

    said = lab.refusal("vm-test", "debian12", PEERCREDD_VM_ACCELERATOR="warp")

    assert said.endswith("PEERCREDD_VM_ACCELERATOR=warp: take one of: kvm, tcg")


@pytest.mark.root
@pytest.mark.parametrize("command", ["vm-test", "vm-shell"])
def test_without_space_for_what_a_machine_writes_none_is_booted(
    lab: Lab, tmp_path: Path, command: str
) -> None:
    lab.box(HANGS)
    little = tmp_path / "little"
    little.mkdir()

    said = lab.refusal(command, "debian12", before=on_a_small_disk(little), TMPDIR=str(little))

    assert f"{little} has 64 MiB free" in said
    assert "may write 2048 there; make room, or let TMPDIR name another folder" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_interrupted_leaves_no_machine(lab: Lab, number: signal.Signals) -> None:
    lab.box(HANGS)
    process = lab.start("vm-test", "debian12", PEERCREDD_VM_ACCELERATOR="tcg")
    qemu = wait_for_qemu(process)

    process.send_signal(number)

    ended = select.poll()
    ended.register(qemu, select.POLLIN)
    assert ended.poll(patient(30) * 1000)
    os.close(qemu)
    assert process.wait(patient(30)) != 0


def test_a_shell_that_is_ended_by_many_signals_leaves_nothing(lab: Lab, tmp_path: Path) -> None:
    lab.box(HANGS)
    folder = tmp_path / "temporary"
    folder.mkdir()
    process = lab.start("vm-shell", "debian12", PEERCREDD_VM_ACCELERATOR="tcg", TMPDIR=str(folder))
    qemu = wait_for_qemu(process)
    assert list(folder.iterdir())

    while process.poll() is None:
        process.send_signal(signal.SIGTERM)

    ended = select.poll()
    ended.register(qemu, select.POLLIN)
    assert ended.poll(patient(30) * 1000)
    os.close(qemu)
    assert list(folder.iterdir()) == []
    assert process.returncode == 128 + signal.SIGTERM


def wait_for_qemu(lab: subprocess.Popen[str]) -> int:
    """Wait until the lab's child has become QEMU; returns a pidfd of it."""
    while lab.poll() is None:
        for pid in qemus(lab.pid):
            return os.pidfd_open(pid)
        os.sched_yield()
    raise AssertionError(lab.communicate())


def qemus(parent: int) -> list[int]:
    """The children of a process that run QEMU."""
    found = []
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            # The kernel keeps 15 letters of a name.
            if Path(f"/proc/{pid}/comm").read_text().strip() == QEMU[:15]:
                found.append(int(pid))
    return found
