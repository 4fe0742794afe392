"""The VM lab, with boxes of a test's own, as a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from vagrant import kernels, recipe
from vagrant.box import Box

QEMU = "qemu-system-x86_64"

# A kernel that any QEMU starts, by the multiboot header at its beginning. It is loaded to
# 1 MiB with neither data nor memory to clear, and its first instruction is behind the header.
_MAGIC, _ADDRESSES_ARE_GIVEN, _ORIGIN = 0x1BADB002, 1 << 16, 0x100000
_HEADER = [_MAGIC, _ADDRESSES_ARE_GIVEN, -(_MAGIC + _ADDRESSES_ARE_GIVEN) & 0xFFFFFFFF]
_HEADER += [_ORIGIN, _ORIGIN, _ORIGIN + 48, 0, _ORIGIN + 32]
_MULTIBOOT = b"".join(word.to_bytes(4, "little") for word in _HEADER)
HANGS = _MULTIBOOT + b"\xfa\xf4\xeb\xfd".ljust(16, b"\x90")  # cli; hlt; jump back
CRASHES = _MULTIBOOT + b"\x0f\x01\x1d\0\0\0\0\x0f\x0b".ljust(16, b"\x90")  # lidt (0); ud2


def on_a_small_disk(folder: Path) -> tuple[str, ...]:
    """What runs a command that finds a disk of 64 MiB in a folder, and nobody else does."""
    mount = f"mount -t tmpfs -o size=64m lab {shlex.quote(str(folder))}"
    return ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")


class Lab:
    """``python -m vagrant`` with boxes in `folder`."""

    def __init__(self, folder: Path, exit_stack: ExitStack) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PEERCREDD_")},
            "PEERCREDD_LAB": str(folder),
            "PEERCREDD_VM_RESULTS": str(folder.with_name("results")),
        }
        self._exit = exit_stack

    def start(
        self, *arguments: str, before: tuple[str, ...] = (), **more: str
    ) -> subprocess.Popen[str]:
        """Start a command; `before` runs it, `more` is for its environment."""
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "vagrant", *arguments],
            cwd=recipe.PROJECT,
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._exit.enter_context(process)
        self._exit.callback(process.kill)
        return process

    def refusal(self, *arguments: str, before: tuple[str, ...] = (), **more: str) -> str:
        """What a command that has to fail says last."""
        process = self.start(*arguments, before=before, **more)
        _, said = process.communicate()
        assert process.returncode == 1, said
        return said.splitlines()[-1]

    def box(self, kernel: bytes, architecture: str = recipe.ARCHITECTURE) -> Box:
        """A box of Debian 12's, with an empty disk and a kernel of four instructions."""
        listed = kernels.find("debian12")
        box = Box(listed, self.folder / f"{listed.name}-{recipe.fingerprint(listed)}")
        box.folder.mkdir(parents=True)
        (box.folder / "box.json").write_text(f'{{"architecture": "{architecture}"}}')
        box.vmlinuz.write_bytes(kernel)
        box.initrd.touch()
        subprocess.run(["qemu-img", "create", "-qf", "qcow2", box.disk, "1M"], check=True)
        return box
