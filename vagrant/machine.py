"""A box, booted in QEMU for as long as it is needed."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vagrant import recipe
from vagrant.box import Box
from vagrant.errors import LabError, tail
from vagrant.kernels import COMMAND_LINE
from vagrant.programs import DIES_WITH_US

QEMU = "qemu-system-x86_64"
BOOT_SECONDS = 600.0
PROBE_SECONDS = 10.0
MEMORY_PER_CPU = 768  # MiB
MEMORY_BESIDES = 512  # MiB
_CPU = {"kvm": "host", "tcg": "qemu64"}
_NEVER_HANG = ("-display", "none", "-no-reboot", "-action", "panic=exit-failure")


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
            *("-o", "ServerAliveInterval=30", "-o", "ServerAliveCountMax=10"),
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
    return "tcg"


@asynccontextmanager
async def running(box: Box, accelerator: str, cpus: int, logs: Path) -> AsyncIterator[Machine]:
    """Boot `box`; leaving ends the machine, and what it wrote to its disk is gone.

    Args:
        box: What to boot.
        accelerator: ``kvm`` or ``tcg``.
        cpus: How many the machine gets.
        logs: Takes the serial console, and what QEMU says.

    Raises:
        LabError: it does not boot.
    """
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
            *("-kernel", box.vmlinuz, "-initrd", box.initrd, "-append", COMMAND_LINE),
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
        )
    try:
        try:
            async with asyncio.timeout(BOOT_SECONDS):
                port = await _port_when_ready(qemu)
        except TimeoutError:
            raise LabError(
                f"{box.kernel.name} did not boot within {BOOT_SECONDS:.0f} s; "
                f"its console is in {console}",
                tail(console),
            ) from None
        except EOFError:
            raise LabError(
                f"{box.kernel.name} did not boot: QEMU has ended; see {said} and {console}",
                f"{tail(console)}\n{tail(said)}".strip(),
            ) from None
        try:
            yield Machine(port, key)
        except LabError as error:
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await qemu.wait()
                raise LabError(
                    f"{box.kernel.name} has ended, as after a panic; see {console}", tail(console)
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


async def _port_when_ready(qemu: Process) -> int:
    """Wait until the guest opens its port; raises EOFError if QEMU ends before."""
    await _answer(qemu, "qmp_capabilities")
    network = await _answer(qemu, "human-monitor-command", {"command-line": "info usernet"})
    forwarded = re.search(r"HOST_FORWARD\S*\s+\d+\s+127\.0\.0\.1\s+(\d+)", network)
    assert forwarded, network
    while True:
        message = await _message(qemu)
        if message.get("event") == "VSERPORT_CHANGE" and message["data"]["open"]:
            return int(forwarded[1])


async def _answer(qemu: Process, command: str, arguments: dict[str, str] | None = None) -> Any:
    assert qemu.stdin
    request = {"execute": command, "arguments": arguments or {}}
    qemu.stdin.write(json.dumps(request).encode() + b"\n")
    while "return" not in (message := await _message(qemu)):
        assert "error" not in message, message
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
