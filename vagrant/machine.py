"""A box, booted in QEMU for as long as it is needed."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vagrant import recipe
from vagrant.box import Box
from vagrant.errors import LabError, MachineError, tail
from vagrant.kernels import COMMAND_LINE
from vagrant.programs import DIES_WITH_US, run

QEMU = "qemu-system-x86_64"
SPACE = 2 << 30
"""Bytes that a machine may come to write to its disk, in a file of QEMU's that has no name."""
HANGS_BEFORE = (8, 1)
"""Older QEMUs may go on with their translation of code that the kernel has patched meanwhile."""
BOOT_SECONDS = 600.0
PROBE_SECONDS = 10.0
ANSWER_SECONDS = 60.0
BETWEEN_SAMPLES_SECONDS = 5.0
EXAMINE_SECONDS = 60.0
REGISTERS = "registers.log"
MEMORY_PER_CPU = 768  # MiB
MEMORY_BESIDES = 512  # MiB
_CPU = {"kvm": "host", "tcg": "qemu64"}
_NEVER_HANG = ("-display", "none", "-no-reboot", "-action", "panic=exit-failure")
# The kernel then shows what each CPU (64) and each task (1) is doing.
_PANIC_ON_NMI = "unknown_nmi_panic panic_print=65"
_MOST_OF_AN_ANSWER = 1 << 20  # bytes
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Machine:
    """A running machine that answers ssh."""

    port: int
    key: Path

    def ssh(self, *options: str) -> list[str]:
        """The command that runs one in the machine, as root; the command itself comes behind."""
        return [
            *("ssh", "-F", "/dev/null", "-i", str(self.key), "-p", str(self.port)),
            *("-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR"),
            # Port and host key are this machine's only as long as it runs.
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            # However busy a machine is, it answers one of twelve.
            *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=12"),
            *options,
            "root@127.0.0.1",
        ]


async def accelerator(box: Box) -> str:
    """What QEMU can run a kernel with here: ``kvm``, or ``tcg``, which is emulation.

    /dev/kvm says little: where it is virtual itself, guests may hang. So the kernel is
    started without a disk: within two seconds it panics, and QEMU ends.
    """
    if chosen := os.environ.get("PEERCREDD_VM_ACCELERATOR"):
        if chosen not in _CPU:
            raise LabError(f"PEERCREDD_VM_ACCELERATOR={chosen}: take one of: {', '.join(_CPU)}")
        if chosen == "tcg":
            _warn_of_old_qemu()
        return chosen
    probe = await asyncio.create_subprocess_exec(
        *(*DIES_WITH_US, QEMU, "-accel", "kvm", "-cpu", _CPU["kvm"], "-m", "512", *_NEVER_HANG),
        *("-kernel", box.vmlinuz, "-append", "console=ttyS0 panic=-1", "-serial", "stdio"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            console, _ = await probe.communicate()
    except TimeoutError:
        console = b""
    finally:
        await _end(probe)
    if b"Kernel panic" in console:
        return "kvm"
    click.echo("KVM does not work here: emulating, which is some ten times slower", err=True)
    _warn_of_old_qemu()
    return "tcg"


def require_space(machines: int) -> None:
    """Raises LabError if that many machines have no room for what they write."""
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    free, needed = shutil.disk_usage(folder).free, machines * SPACE
    if free < needed:
        raise LabError(
            f"{folder} has {free >> 20} MiB free, and {machines} at a time may write "
            f"{needed >> 20} there; make room, or let TMPDIR name another folder"
        )


def _warn_of_old_qemu() -> None:
    said = subprocess.check_output([QEMU, "--version"], text=True)
    version = re.search(r"version (\d+)\.(\d+)", said)
    assert version, said
    if (int(version[1]), int(version[2])) < HANGS_BEFORE:
        click.echo(
            f"QEMU {version[0].removeprefix('version ')} may hang what it emulates; "
            f"{'.'.join(map(str, HANGS_BEFORE))} or newer does not (docs/vm.md)",
            err=True,
        )


@asynccontextmanager
async def running(box: Box, accelerator: str, cpus: int, logs: Path) -> AsyncIterator[Machine]:
    """Boot `box`; leaving ends the machine, and what it wrote to its disk is gone.

    Args:
        box: What to boot.
        accelerator: ``kvm`` or ``tcg``.
        cpus: How many the machine gets.
        logs: Takes the serial console, what QEMU says, and of a machine that hangs what
            its CPUs were doing.

    Raises:
        MachineError: it does not boot; or it was found to be lost after a LabError that was
            raised while it should have run.
    """
    began = time.monotonic()
    key = logs / "ssh-key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    console = logs / "console.log"
    said = logs / "qemu.log"
    credentials = {
        "ssh.authorized_keys.root": key.with_suffix(".pub").read_text(),
        # Whoever reaches the port has Vagrant's key as well.
        "tmpfiles.extra": f"r {recipe.VAGRANT_KEYS}\n",
    }
    with said.open("wb") as errors:
        qemu = await asyncio.create_subprocess_exec(
            *(*DIES_WITH_US, QEMU, "-nodefaults", *_NEVER_HANG, "-qmp", "stdio"),
            *("-accel", accelerator, "-cpu", _CPU[accelerator], "-smp", str(cpus)),
            *("-m", str(MEMORY_BESIDES + cpus * MEMORY_PER_CPU)),
            *("-kernel", box.vmlinuz, "-initrd", box.initrd),
            *("-append", f"{COMMAND_LINE} {_PANIC_ON_NMI}"),
            *("-drive", f"file={box.disk},if=virtio,format=qcow2,snapshot=on,cache=unsafe"),
            # The kernel finds a port that is free.
            *("-netdev", "user,id=network,hostfwd=tcp:127.0.0.1:0-:22"),
            *("-device", "virtio-net-pci,netdev=network,romfile="),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-chardev", "null,id=ready"),
            *("-device", f"virtserialport,id=ready,chardev=ready,name={recipe.READY_PORT}"),
            *("-serial", f"file:{console}"),
            *_as_firmware_strings(credentials),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            process_group=0,
            limit=_MOST_OF_AN_ANSWER,
        )
    try:
        try:
            async with asyncio.timeout(BOOT_SECONDS):
                machine = Machine(await _forwarded_port(qemu), key)
                await _until_ready(qemu)
        except TimeoutError:
            last = tail(console)
            await _examine(qemu, logs / REGISTERS)
            raise MachineError(
                f"{box.kernel.name} did not boot within {BOOT_SECONDS:.0f} s; "
                f"its console is in {console}",
                last,
            ) from None
        except EOFError:
            raise MachineError(
                f"{box.kernel.name} did not boot: QEMU has ended; see {said} and {console}",
                f"{tail(console)}\n{tail(said)}".strip(),
            ) from None
        try:
            yield machine
        except LabError as error:
            after = f"{time.monotonic() - began:.0f} s after its start"
            if await _ends(qemu):
                raise MachineError(
                    f"{box.kernel.name} ended {after}, as after a panic; see {console}",
                    tail(console),
                ) from error
            if not await _answers(machine):
                last = tail(console)
                await _examine(qemu, logs / REGISTERS)
                raise MachineError(
                    f"{box.kernel.name} hung: it was found to answer no more {after}; "
                    f"see {console} and {logs / REGISTERS}",
                    last,
                ) from error
            raise
    finally:
        await _end(qemu)
        key.unlink()
        key.with_suffix(".pub").unlink()


def _as_firmware_strings(credentials: dict[str, str]) -> list[str]:
    """QEMU's options that hand systemd(1) of a guest its credentials."""
    options = []
    for name, value in credentials.items():
        encoded = base64.b64encode(value.encode()).decode()
        options += ["-smbios", f"type=11,value=io.systemd.credential.binary:{name}={encoded}"]
    return options


async def _forwarded_port(qemu: Process) -> int:
    await _answer(qemu, "qmp_capabilities")
    network = await _monitor(qemu, "info usernet")
    forwarded = re.search(r"HOST_FORWARD\S*\s+\d+\s+127\.0\.0\.1\s+(\d+)", network)
    assert forwarded, network
    return int(forwarded[1])


async def _until_ready(qemu: Process) -> None:
    """Wait until the guest opens its port; raises EOFError if QEMU ends before."""
    opened = False
    while not opened:
        message = await _message(qemu)
        opened = message.get("event") == "VSERPORT_CHANGE" and message["data"]["open"]


async def _ends(qemu: Process) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            await qemu.wait()
    return qemu.returncode is not None


async def _answers(machine: Machine) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(ANSWER_SECONDS):
            return await run(*machine.ssh(), "true", log=Path(os.devnull)) == 0
    return False


async def _examine(qemu: Process, registers: Path) -> None:
    """Write down what a hung machine's CPUs do, and have its kernel show that on the console.

    The kernel panics of it, which ends QEMU.
    """
    with suppress(EOFError, ConnectionError, TimeoutError), registers.open("w") as file:
        async with asyncio.timeout(EXAMINE_SECONDS):
            # Where a CPU that loops is found twice.
            file.write(await _monitor(qemu, "info registers -a"))
            await asyncio.sleep(BETWEEN_SAMPLES_SECONDS)
            file.write(await _monitor(qemu, "info registers -a"))
            await _answer(qemu, "inject-nmi")
            await qemu.wait()


async def _monitor(qemu: Process, command: str) -> str:
    """What QEMU tells people."""
    return str(await _answer(qemu, "human-monitor-command", {"command-line": command}))


async def _answer(qemu: Process, command: str, arguments: dict[str, str] | None = None) -> Any:
    assert qemu.stdin
    number = next(_NUMBERS)
    request = {"execute": command, "arguments": arguments or {}, "id": number}
    qemu.stdin.write(json.dumps(request).encode() + b"\n")
    # Events come in between, and an answer that nobody waited for.
    while (message := await _message(qemu)).get("id") != number:
        pass
    assert "return" in message, message
    return message["return"]


async def _message(qemu: Process) -> dict[str, Any]:
    assert qemu.stdout
    line = await qemu.stdout.readline()
    if not line:
        raise EOFError
    return dict(json.loads(line))


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
